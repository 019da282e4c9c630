"""A kit: ONNX graphs, recorded inputs and the outputs they gave here, and a runner that needs onnxruntime and numpy.

    KIT/kit.json                  what is in it, how to measure, what may differ, and every file's hash
    KIT/run_kit.py, README.md
    KIT/models/<slug>/            a graph with its external data
    KIT/data/<case>/…npy          inputs, and expected outputs of each model

Wherever it is taken, the runner checks the answers first and then measures the models in turns.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from converters.errors import InputError
from converters.onnx.generate import greedy_decode
from converters.onnx.graph_facts import GraphFacts, external_files, read_graph
from converters.onnx.runtime import open_session
from converters.publishing import published_folder
from prehab_export.config import BenchConfig
from prehab_export.measurement.feeds import Case, prepare_request
from prehab_export.measurement.targets.results import FORMAT, Json
from prehab_export.system import link, render, sha256_of

KIT, RUNNER = "kit.json", "run_kit.py"

# How far outputs may be off, as a share of the largest expected one. Kernels differ between processors: in float32 by
# the order of their sums, in int8 also by where sums saturate and activations round.
FLOAT32_TOLERANCE, QUANTISED_TOLERANCE = 1e-3, 0.2


@dataclass(frozen=True)
class Kit:
    """A kit on disk and what its ``kit.json`` says."""

    folder: Path
    facts: Json

    @property
    def digest(self) -> str:
        """SHA-256 of kit.json, which holds those of all other files."""
        return sha256_of(self.folder / KIT)


def make_kit(models: Mapping[str, Path], folder: Path, config: BenchConfig, cooldown_s: float = 0.0) -> Kit:
    """Write a kit; the folder appears only when it is complete.

    Args:
        models: name → graph; the first is the baseline that the others are compared with.
        config: its threads, sizes and rounds are the runner's defaults.
        cooldown_s: rest before each turn.

    Raises:
        InputError: the folder holds something else or results, a graph is missing, or the graphs take different inputs.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / KIT).is_file())):
        raise InputError(f"{folder} holds something that is no kit; name a new folder")
    if any(folder.glob("results*.json")):
        raise InputError(
            f"{folder} holds results, which a new kit would take away: read them back with "
            "`prehab-export report OUT --target-results`, then move them, or name a new folder"
        )
    graphs = {name: read_graph(path) for name, path in models.items()}
    if not graphs:
        raise InputError("there are no models to make a kit of")
    if len({(graph.takes_tokens, graph.decodes) for graph in graphs.values()}) > 1:
        raise InputError("the models take different inputs, and one kit cannot serve them")
    with published_folder(folder, replace=True) as part:
        facts = _written(graphs, part, config, cooldown_s)
    return Kit(folder, facts)


def read_kit(folder: Path) -> Kit:
    """Raises:
    InputError: no kit there, or one of another format.
    """
    try:
        facts = json.loads((folder / KIT).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} is no kit: it has no {KIT}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / KIT} is damaged: {error}; make the kit again") from error
    if facts.get("format") != FORMAT:
        raise InputError(f"{folder} is a kit of format {facts.get('format')}, not {FORMAT}; make it again")
    return Kit(folder, facts)


def _written(graphs: Mapping[str, GraphFacts], folder: Path, config: BenchConfig, cooldown_s: float) -> Json:
    slugs = _slugs(list(graphs))
    rows = [_copy_model(name, slugs[name], graph, folder) for name, graph in graphs.items()]
    cases = [_record(case, graphs, slugs, folder) for case in _cases(graphs, config)]
    shutil.copyfile(str(files("prehab_export.measurement.targets") / "kit_runner.py"), folder / RUNNER)
    facts: Json = {
        "format": FORMAT,
        "producer": f"prehab-export {version('prehab-export')}",
        "runtime_version": onnxruntime.__version__,
        "models": rows,
        "cases": cases,
        "protocol": {
            "threads": list(config.thread_counts or (config.threads,)),
            "warmup": config.warmup,
            "rounds": config.rounds,
            "min_seconds": config.min_seconds,
            "cooldown_s": cooldown_s,
        },
        "tolerance": {row["slug"]: {"relative": _tolerance(row["kind"])} for row in rows},
    }
    (folder / "README.md").write_text(render("measurement", "kit.md.j2", facts), encoding="utf-8")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    facts["files"] = {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in names
    }
    (folder / KIT).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _slugs(names: Sequence[str]) -> dict[str, str]:
    slugs = {name: re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model" for name in names}
    taken = list(slugs.values())
    return {name: slug if taken.count(slug) == 1 else f"{slug}-{at}" for at, (name, slug) in enumerate(slugs.items())}


def _copy_model(name: str, slug: str, graph: GraphFacts, folder: Path) -> Json:
    place = folder / "models" / slug
    place.mkdir(parents=True)
    model = onnx.load(graph.path, load_external_data=False)
    link(str(graph.path), str(place / graph.path.name))
    for file in external_files(model):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        # Not as a link: onnx reads no weights that have another name somewhere, those of the run's own graph included.
        shutil.copyfile(graph.path.parent / file, place / file)
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    small = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    return {
        "name": name,
        "slug": slug,
        "file": f"models/{slug}/{graph.path.name}",
        "bytes": graph.file_bytes,
        "kind": "quantised" if kinds & small else "float32",
    }


def _tolerance(kind: str) -> float:
    return FLOAT32_TOLERANCE if kind == "float32" else QUANTISED_TOLERANCE


def _cases(graphs: Mapping[str, GraphFacts], config: BenchConfig) -> list[Case]:
    graph = next(iter(graphs.values()))
    sizes = [known.vocab_size for known in graphs.values() if known.vocab_size is not None]
    if graph.takes_tokens and not sizes:
        raise InputError(f"no embedding table was found in {graph.path}; a kit cannot tell what tokens to feed it")
    sequences: tuple[int | None, ...] = config.sequence_lengths if graph.takes_tokens else (None,)
    return [
        Case(config.threads, batch, sequence, config.new_tokens, min(sizes, default=None), config.end_tokens)
        for batch in config.batch_sizes
        for sequence in sequences
    ]


def _record(case: Case, graphs: Mapping[str, GraphFacts], slugs: Mapping[str, str], folder: Path) -> Json:
    """The inputs of a case, and what each model answers here."""
    name = f"batch{case.batch}" + (f"-seq{case.sequence}" if case.sequence else "")
    place = folder / "data" / name
    place.mkdir(parents=True)

    def keep(label: str, array: np.ndarray) -> str:
        np.save(place / f"{label}.npy", array)
        return f"data/{name}/{label}.npy"

    inputs: dict[str, str] = {}
    expected: dict[str, dict[str, str]] = {}
    tokens: dict[str, list[list[int]]] = {}
    for model, graph in graphs.items():
        session, slug = open_session(graph.path, case.threads), slugs[model]
        try:
            request = prepare_request(session, case)
        except ValueError as error:
            raise InputError(f"{model} at {name}: {error}") from error
        feeds = {key: value.numpy().copy() for key, value in request.prefill.items()}
        if not inputs:
            inputs = {key: keep(key, value) for key, value in feeds.items()}
        names = [output.name for output in session.get_outputs() if not output.name.startswith("present.")]
        outputs = session.run(names, feeds)
        expected[slug] = {key: keep(f"expected-{slug}-{key}", value) for key, value in zip(names, outputs, strict=True)}
        if graph.decodes:
            decoded = greedy_decode(session, feeds["input_ids"], case.new_tokens)
            tokens[slug] = decoded[:, feeds["input_ids"].shape[1] :].tolist()
    return {
        "name": name,
        "batch": case.batch,
        "sequence": case.sequence,
        "inputs": inputs,
        "expected": expected,
        "new_tokens": case.new_tokens if tokens else None,
        "expected_tokens": tokens or None,
    }
