"""``--ort``: the compressed graphs of a run in ONNX Runtime's own format, checked against what they were made from."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from converters.onnx.ort_format import mobile_verdict, write_ort
from converters.onnx.session import open_session
from prehab_export.errors import InputError, ParityError
from prehab_export.evaluation import feeds_of
from prehab_export.progress import say, warn
from prehab_export.quantization import quantized_graphs
from prehab_export.session import Session
from prehab_export.tasks import Batch
from prehab_export.workspace import write_json

# The same kernels on the same machine; optimising beforehand may change the order of a sum.
TOLERANCE = 1e-4
SAMPLES = 8


def write_ort_files(session: Session, folder: Path) -> None:
    """``onnx/<name>.ort`` and its configuration for every compressed graph, and the verdict for phones.

    Raises:
        InputError: the format cannot hold the float32 graph; a quantised one that it cannot hold is left out.
        ParityError: an .ort file does not answer as the graph it was made from.
    """
    plain = session.workspace.folder("export") / "model" / "onnx" / "model.onnx"
    quantised = {name: graph for name, graph in quantized_graphs(session).items() if name.startswith("compressed")}
    rows, left_out = [], []
    for name, graph in {"compressed": plain, **quantised}.items():
        say(f"  {name}")
        try:
            files = write_ort(graph, folder / "onnx")
        except InputError as reason:
            if graph == plain:
                raise
            warn(str(reason))
            left_out.append({"graph": name, "reason": str(reason)})
            continue
        samples = session.data.evaluation.subset(min(SAMPLES, len(session.data.evaluation)), 0)
        apart = largest_difference(graph, files.model, samples.batches(4), session.threads)
        if apart > TOLERANCE:
            raise ParityError(f"{files.model.name} is off by {apart:.1e} from {graph.name}, {TOLERANCE:.0e} is allowed")
        rows.append(
            {"graph": name, "file": files.model.name, "bytes": files.model.stat().st_size, "max_relative": apart}
        )
    facts = {"files": rows, "left_out": left_out, "mobile": asdict(mobile_verdict(plain))}
    write_json(folder / "ort.json", facts)


def largest_difference(graph: Path, ort: Path, batches: Iterable[Batch], threads: int) -> float:
    """The largest difference of the logits of two files of one graph, relative to their scale."""
    ours, theirs = (open_session(path, threads) for path in (graph, ort))
    inputs: list[Any] = ours.get_inputs()
    worst = 0.0
    for batch in batches:
        feeds = feeds_of(inputs, batch)
        expected, found = (np.asarray(one.run(["logits"], feeds)[0], np.float64) for one in (ours, theirs))
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst
