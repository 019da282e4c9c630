"""Quantised graphs of a dense decoder: bytes, perplexity, and milliseconds a prompt and a token, in turns.

    python benchmarks/tied_tables.py MODEL TEXT --also NAME=GRAPH --out benchmarks/results/tied-tables.json

``--also`` puts graphs of the same model beside them that another version wrote.
"""

import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import numpy as np
import onnxruntime
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters.onnx.export import export_onnx
from converters.onnx.generate import empty_cache, step_inputs
from converters.onnx.modes import FILE_NAMES
from converters.onnx.quantize import quantize_graph
from converters.onnx.runtime import open_session
from prehab_export.system.machine import machine_facts

MODES = ("int8", "int8-tables4", "int8-blocks", "int4", "float16")
WINDOW, WINDOWS = 128, 24


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--also", multiple=True, metavar="NAME=GRAPH")
@click.option("--threads", default=2)
@click.option("--turns", default=25)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(model: Path, text: Path, also: tuple[str, ...], threads: int, turns: int, out: Path) -> None:
    ids = AutoTokenizer.from_pretrained(model)(text.read_text()[: 40 * WINDOW * WINDOWS])["input_ids"]
    windows = np.array(ids[: WINDOW * WINDOWS], np.int64).reshape(WINDOWS, WINDOW)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        export_onnx(AutoModelForCausalLM.from_pretrained(model), "text-generation", source)
        graphs = {"float32": source}
        graphs |= {mode: quantize_graph(source, Path(folder, FILE_NAMES[mode]), mode) for mode in MODES}
        graphs |= {name: Path(path) for name, path in (entry.split("=") for entry in also)}
        sessions = {name: open_session(path, threads) for name, path in graphs.items()}
        rows = {
            name: {"bytes": path.stat().st_size, "perplexity": perplexity(sessions[name], windows)}
            for name, path in graphs.items()
        }
    requests = {"prompt_ms": (windows[:1], 0), "token_ms": (windows[:1, :1], WINDOW)}
    taken: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in requests} for name in sessions}
    for _ in range(turns):
        for name, session in sessions.items():
            for kind, (step, past) in requests.items():
                taken[name][kind].append(milliseconds(session, step, past))
    for name, kinds in taken.items():
        for kind, values in kinds.items():
            rows[name] |= {kind: median(values), f"least_{kind}": min(values), f"every_{kind}": values}
    facts = {"command": shlex.join(["python", *sys.argv]), "machine": machine_facts(), "threads": threads, "rows": rows}
    out.write_text(json.dumps(facts, indent=1) + "\n")


def perplexity(session: onnxruntime.InferenceSession, windows: np.ndarray) -> float:
    losses = []
    for window in windows:
        feeds = step_inputs(session, window[None], WINDOW) | empty_cache(session, 1)
        logits = session.run(["logits"], feeds)[0][0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, window[1:, None], -1)[:, 0]
        losses.append(np.log(np.exp(logits).sum(-1)) - chosen)
    return float(np.exp(np.concatenate(losses).mean()))


def milliseconds(session: onnxruntime.InferenceSession, step: np.ndarray, past: int) -> float:
    cache = {
        name: np.zeros((1, value.shape[1], past, value.shape[3]), value.dtype)
        for name, value in empty_cache(session, 1).items()
    }
    feeds = step_inputs(session, step, past + step.shape[1]) | cache
    start = time.perf_counter()
    session.run(["logits"], feeds)
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
