"""Verification: reload the written model and graphs in a fresh process, and compare them with the model in memory."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from converters.errors import InputError
from prehab_export.config import RunConfig, from_dict
from prehab_export.deployment import TOLERANCE, check_graph, check_reloaded, load_reference
from prehab_export.pipeline.session import Session, prepare_process
from prehab_export.pipeline.workspace import Workspace
from prehab_export.system import (
    ParityError,
    StorageError,
    die_with_parent,
    environment,
    is_full,
    out_of_space,
    python_module,
    write_json,
)


def verify(session: Session) -> dict[str, Any]:
    """Check the exported folder, and the dense graph if there is one.

    Returns:
        The figures of every check, and the task metric of both graphs. Without a dense graph, the dense model's metric
        is that in PyTorch.

    Raises:
        ParityError: a reloaded tensor or answer differs, or a graph's outputs differ by more than the tolerance.
    """
    export, baseline = session.workspace.folder("export"), session.workspace.folder("baseline")
    compressed, dense = export / "model" / "onnx" / "model.onnx", session.dense_graph
    reload = check_reloaded(export, session.task, trust_remote_code=session.config.trust_remote_code)
    checks: dict[str, Any] = {
        "compressed": {"reload": reload, "onnx": _check_graph(session, export, compressed, "compressed")}
    }
    if dense is not None:
        checks["dense"] = {"onnx": _check_graph(session, baseline, dense, "dense")}
    dense_metrics = json.loads((baseline / "metrics.json").read_text(encoding="utf-8"))
    return {
        "tolerance": TOLERANCE,
        **checks,
        "metrics": {
            "dense_pytorch" if dense is None else "dense_onnx": dense_metrics,
            "compressed_onnx": asdict(session.graph_metrics(compressed, "compressed model, ONNX Runtime")),
        },
    }


def _check_graph(session: Session, folder: Path, graph: Path, name: str) -> dict[str, Any]:
    try:
        return check_graph(load_reference(folder), session.task, graph, session.threads)
    except ParityError as error:
        raise ParityError(f"the {name} model: {error}") from error


def verify_in_fresh_process(session: Session, folder: Path) -> None:
    """Run `verify` in a new interpreter, so that it cannot use anything but the files on disk; write ``verify.json``.

    Raises:
        InputError, ParityError: `verify` raised this error in the other process.
        StorageError: the disk of the run or of temporary files is full or fails.
        RuntimeError: the process ended in any other way.
    """
    workspace = session.workspace
    request = {"config": asdict(session.config), "output": str(workspace.root), "current": workspace.current}
    answer_path = folder / "verify.json"
    process = subprocess.run(
        python_module("prehab_export.pipeline.stages.verify", str(answer_path)),
        env=environment(),
        input=json.dumps(request),
        encoding="utf-8",
        check=False,
        preexec_fn=die_with_parent(),
    )
    answer = json.loads(answer_path.read_text(encoding="utf-8")) if answer_path.is_file() else {}
    if "parity_error" in answer:
        raise ParityError(answer["parity_error"])
    if "input_error" in answer:
        raise InputError(answer["input_error"])
    if process.returncode == StorageError.exit_code:
        raise StorageError("the disk is full or failed during verification; free some space on the disk named above")
    if process.returncode or "metrics" not in answer:
        raise RuntimeError(f"the verification process ended with status {process.returncode}; its output is above")


def _main(answer_path: Path) -> None:
    request = json.load(sys.stdin)
    session = Session(from_dict(RunConfig, request["config"]), Workspace(Path(request["output"]), request["current"]))
    prepare_process(session.config)
    try:
        try:
            answer = verify(session)
        except (ParityError, FloatingPointError) as error:  # the model in memory did not overflow
            answer = {"parity_error": str(error)}
        except InputError as error:
            if is_full(error):
                raise
            answer = {"input_error": str(error)}
        write_json(answer_path, answer)
    except Exception as error:  # a full disk may prevent writing the answer, so the exit code reports it
        if (reason := out_of_space(error)) is None:
            raise
        print(f"verification: {reason}", file=sys.stderr)
        sys.exit(StorageError.exit_code)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
