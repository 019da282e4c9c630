"""The quantised graphs of a run, compressed and dense, each evaluated with the task's metric."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from converters.folder import from_pretrained
from converters.onnx.graph_facts import read_graph
from converters.onnx.modes import FILE_NAMES
from converters.onnx.quantize import Feeds, quantize_graph
from converters.onnx.quantized_weights import count_quantized
from converters.onnx.runtime import open_session
from converters.onnx.weights import replace_weights, weight_names
from converters.onnx.write import data_file
from converters.publishing import move_together
from prehab_export.compression import GridFit, refit_to_grid
from prehab_export.deployment import tell_quantized
from prehab_export.inputs import Metrics, feeds_of
from prehab_export.linalg import GRIDS
from prehab_export.pipeline.session import Session
from prehab_export.system import bar, named, say, write_json

# Activation ranges need far fewer samples than moments do.
ACTIVATION_SAMPLES = 128


def quantize(session: Session, folder: Path) -> None:
    """Write ``dense/`` and ``compressed/``, with a graph per mode in each, and their metrics in ``quantize.json``.

    Without a dense graph there is no ``dense/``.
    The compressed model's factors are refitted to each mode's grid if that lowers the held-out loss.
    """
    sources = _with_dense(session, {"compressed": session.workspace.folder("export") / "model" / "onnx" / "model.onnx"})
    rows = []
    for mode in session.config.quantize:
        for side, source in sources.items():
            say(f"  {side} {mode}")
            sample = partial(activation_sample, session, source)
            graph = quantize_graph(source, folder / side / FILE_NAMES[mode], mode, sample)
            metrics, refit = session.graph_metrics(graph, f"{side} {mode}"), None
            if side == "compressed" and session.config.quantize_refit and mode in GRIDS:
                metrics, refit = _try_refit(session, source, graph, mode, metrics)
            facts = {"model": side, "mode": mode, "bytes": read_graph(graph).file_bytes, **asdict(metrics)}
            counts = count_quantized(source, graph)
            tell_quantized(f"{side} {mode}", counts)
            rows.append(facts | {"refit": refit, "weights_quantised": counts.share, "coverage": asdict(counts)})
    write_json(folder / "quantize.json", {"graphs": rows})


def run_graphs(session: Session) -> dict[str, Path]:
    """Return name → graph, for all graphs of a finished run; the dense float32 graph, if there is one, comes first."""
    compressed = {"compressed": session.workspace.folder("artifact") / "onnx" / "model.onnx"}
    return _with_dense(session, compressed) | quantized_graphs(session)


def _with_dense(session: Session, graphs: dict[str, Path]) -> dict[str, Path]:
    """Put the dense float32 graph, if there is one, before other graphs."""
    dense = session.dense_graph
    return graphs if dense is None else {"dense": dense, **graphs}


def graph_hashes(session: Session) -> dict[str, str]:
    """Return name → hash, for the graphs of `run_graphs`; external weights are part of the hash."""
    workspace, hashes = session.workspace, {}
    for name, graph in run_graphs(session).items():
        stage = graph.relative_to(workspace.root / "stages").parts[0]
        manifest = workspace.manifest(stage, workspace.current[stage])
        assert manifest is not None
        files = (graph, data_file(graph))
        rows = [manifest["files"].get(file.relative_to(workspace.folder(stage)).as_posix()) for file in files]
        hashes[name] = "+".join(row["sha256"] for row in rows if row is not None)
    return hashes


def _try_refit(
    session: Session, source: Path, graph: Path, mode: str, plain: Metrics
) -> tuple[Metrics, dict[str, Any]]:
    """Quantise with factors refitted to the grid, and replace ``graph`` if that lowers the held-out loss.

    Args:
        source: the float32 graph.
        graph: the graph quantised without a refit.
        plain: the metrics of ``graph``.

    Returns:
        The metrics of the graph that is kept, and a comparison of the two graphs.
    """
    held_out = partial(session.graph_metrics, samples=session.held_out)
    folder = graph.with_name(f"{graph.name}.refitted")
    try:
        fits = _refit_weights(session, source, folder / "float32.onnx", mode)
        sample = partial(activation_sample, session, source)
        candidate = quantize_graph(folder / "float32.onnx", folder / graph.name, mode, sample)
        before = held_out(graph, f"held-out loss, {mode}").loss
        after = held_out(candidate, f"held-out loss, {mode} refitted").loss
        refitted = session.graph_metrics(candidate, f"compressed {mode} refitted")
        if is_kept := after < before:
            move_together(folder, data_file(graph), graph)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    facts = {
        "kept": is_kept,
        "layers": sum(len(fit.layers) for fit in fits),
        "objective_plain": sum(fit.plain for fit in fits),
        "objective_refitted": sum(fit.refitted for fit in fits),
        "held_out_loss_plain": before,
        "held_out_loss_refitted": after,
        "plain": asdict(plain),
        "refitted": asdict(refitted),
    }
    return refitted if is_kept else plain, facts


def _refit_weights(session: Session, source: Path, target: Path, mode: str) -> list[GridFit]:
    """Write the float32 graph with factors refitted to the mode's grid; return the fits."""
    folder = session.workspace.folder("export") / "model"
    model = from_pretrained(folder, dtype=torch.float32, trust_remote_code=session.config.trust_remote_code)
    fits = refit_to_grid(
        model,
        session.load_prepared_statistics(),
        GRIDS[mode],
        session.config.cut.gradient_shrinkage,
        replaceable=weight_names(source),
        progress=named(bar, f"fit to {mode}"),
    )
    replace_weights(source, target, model.state_dict())
    return fits


def quantized_graphs(session: Session) -> dict[str, Path]:
    """Return name (``dense int8``) → graph, for all quantised graphs of the run."""
    sides = ("compressed",) if session.dense_graph is None else ("dense", "compressed")
    return {
        f"{side} {mode}": session.workspace.folder("quantize") / side / FILE_NAMES[mode]
        for mode in session.config.quantize
        for side in sides
    }


def activation_sample(session: Session, graph: Path) -> Iterator[Feeds]:
    """Yield batches of inputs to find the ranges of a graph's activations on."""
    inputs: list[Any] = open_session(graph, session.threads).get_inputs()
    samples = session.calibration.subset(min(ACTIVATION_SAMPLES, len(session.calibration)), session.config.seed)
    return (feeds_of(inputs, batch) for batch in samples.batches(session.config.data.batch_size))
