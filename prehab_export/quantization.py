"""The quantised graphs of a run: compressed and dense alike, each measured by the task's own metric."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from converters.onnx.modes import FILE_NAMES
from converters.onnx.quantize import Feeds, quantize_graph
from converters.onnx.session import open_session
from prehab_export.bench_graph import read_graph
from prehab_export.evaluation import feeds_of
from prehab_export.progress import say
from prehab_export.session import Session
from prehab_export.verification import graph_metrics
from prehab_export.workspace import write_json

# Ranges of activations need far fewer samples than moments.
SAMPLE = 128


def quantize(session: Session, folder: Path) -> None:
    """``dense/`` and ``compressed/``, one graph a mode in each, and what each costs."""
    sources = {
        "dense": session.workspace.folder("baseline") / "onnx" / "model.onnx",
        "compressed": session.workspace.folder("export") / "model" / "onnx" / "model.onnx",
    }
    rows = []
    for mode in session.config.quantize:
        for side, source in sources.items():
            say(f"  {side} {mode}")
            graph = quantize_graph(
                source, folder / side / FILE_NAMES[mode], mode, partial(activation_sample, session, source)
            )
            metrics = graph_metrics(session, graph, f"{side} {mode}")
            rows.append({"model": side, "mode": mode, "bytes": read_graph(graph).file_bytes, **asdict(metrics)})
    write_json(folder / "quantize.json", {"graphs": rows})


def graphs_of(session: Session) -> dict[str, Path]:
    """Name → graph, of all that a finished run has to measure; the dense float32 one comes first."""
    root = session.workspace
    return {
        "dense": root.folder("baseline") / "onnx" / "model.onnx",
        "compressed": root.folder("artifact") / "onnx" / "model.onnx",
        **quantized_graphs(session),
    }


def quantized_graphs(session: Session) -> dict[str, Path]:
    """Name (``dense int8``) → graph, of all that the run has."""
    folder = session.workspace.folder("quantize")
    return {
        f"{side} {mode}": folder / side / FILE_NAMES[mode]
        for mode in session.config.quantize
        for side in ("dense", "compressed")
    }


def activation_sample(session: Session, graph: Path) -> Iterator[Feeds]:
    """What to run a graph on, to find the ranges of its activations."""
    inputs: list[Any] = open_session(graph, session.threads).get_inputs()
    samples = session.calibration.subset(min(SAMPLE, len(session.calibration)), session.config.seed)
    return (feeds_of(inputs, batch) for batch in samples.batches(session.config.data.batch_size))
