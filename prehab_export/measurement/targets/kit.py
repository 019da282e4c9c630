"""A kit: a folder with ONNX graphs, recorded inputs and outputs, and a runner that needs only onnxruntime and numpy.

    KIT/kit.json                  the contents, the protocol, the tolerances, and the hash of every file
    KIT/run_kit.py, README.md     the runner and its manual
    KIT/models/<slug>/            a graph with its external data
    KIT/data/<case>/…npy          inputs, and the expected outputs of each model

On any machine, the runner first checks the outputs and then measures the models in turns.
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

# Allowed error of an output, as a share of the largest expected value. Kernels differ between processors: in float32 by
# the order of summation, in int8 also by saturation and by the rounding of activations.
FLOAT32_TOLERANCE, QUANTISED_TOLERANCE = 1e-3, 0.2


@dataclass(frozen=True)
class Kit:
    """A kit on disk, with the contents of its ``kit.json``."""

    folder: Path
    facts: Json

    @property
    def digest(self) -> str:
        """The SHA-256 of kit.json, which holds the hashes of all other files."""
        return sha256_of(self.folder / KIT)


def make_kit(
    models: Mapping[str, Path],
    folder: Path,
    config: BenchConfig,
    cooldown_s: float = 0.0,
    has_baseline: bool = True,
) -> Kit:
    """Write a kit. The folder is published only once it is complete.

    Args:
        models: name → graph. The first graph is the baseline of comparisons.
        config: its threads, sizes and rounds become the runner's defaults.
        cooldown_s: seconds of rest before each turn.
        has_baseline: False if no graph is the baseline; nothing is compared then.

    Raises:
        InputError: the folder holds results or something that is not a kit, a graph is missing, or the graphs take
            different inputs.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / KIT).is_file())):
        raise InputError(f"{folder} holds something that is not a kit; name a new folder")
    if any(folder.glob("results*.json")):
        raise InputError(
            f"{folder} holds results, which a new kit would delete: read them with "
            "`prehab-export report OUT --target-results`, then move them, or name a new folder"
        )
    graphs = {name: read_graph(path) for name, path in models.items()}
    if not graphs:
        raise InputError("there are no models to make a kit of")
    if len({(graph.takes_tokens, graph.decodes) for graph in graphs.values()}) > 1:
        raise InputError("the models take different inputs, and one kit cannot serve them")
    with published_folder(folder, replace=True) as part:
        facts = _write(graphs, part, config, cooldown_s, has_baseline)
    return Kit(folder, facts)


def read_kit(folder: Path) -> Kit:
    """Read a kit from its folder.

    Raises:
        InputError: the folder holds no kit, or a kit of another format.
    """
    try:
        facts = json.loads((folder / KIT).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} is not a kit: it has no {KIT}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / KIT} is damaged: {error}; make the kit again") from error
    if facts.get("format") != FORMAT:
        raise InputError(f"{folder} is a kit of format {facts.get('format')}, not {FORMAT}; make it again")
    return Kit(folder, facts)


def _write(
    graphs: Mapping[str, GraphFacts], folder: Path, config: BenchConfig, cooldown_s: float, has_baseline: bool
) -> Json:
    slugs = _slugs(list(graphs))
    model_rows = [_copy_model(name, slugs[name], graph, folder) for name, graph in graphs.items()]
    cases = [_record_case(case, graphs, slugs, folder) for case in _make_cases(graphs, config)]
    shutil.copyfile(str(files("prehab_export.measurement.targets") / "kit_runner.py"), folder / RUNNER)
    facts: Json = {
        "format": FORMAT,
        "producer": f"prehab-export {version('prehab-export')}",
        "runtime_version": onnxruntime.__version__,
        "models": model_rows,
        "cases": cases,
        "protocol": {
            "threads": list(config.thread_counts or (config.threads,)),
            "warmup": config.warmup,
            "rounds": config.rounds,
            "min_seconds": config.min_seconds,
            "cooldown_s": cooldown_s,
            **({} if has_baseline else {"compares": False}),
        },
        "tolerance": {row["slug"]: {"relative": _tolerance(row["kind"])} for row in model_rows},
    }
    (folder / "README.md").write_text(render("measurement", "kit.md.j2", facts), encoding="utf-8")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    facts["files"] = {
        name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in names
    }
    (folder / KIT).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _slugs(names: Sequence[str]) -> dict[str, str]:
    """Return a unique folder name for each model."""
    slugs = {name: re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model" for name in names}
    all_slugs = list(slugs.values())
    return {
        name: slug if all_slugs.count(slug) == 1 else f"{slug}-{index}"
        for index, (name, slug) in enumerate(slugs.items())
    }


def _copy_model(name: str, slug: str, graph: GraphFacts, folder: Path) -> Json:
    """Copy a model into the kit and return its row of ``kit.json``."""
    destination = folder / "models" / slug
    destination.mkdir(parents=True)
    model = onnx.load(graph.path, load_external_data=False)
    link(str(graph.path), str(destination / graph.path.name))
    for file in external_files(model):
        (destination / file).parent.mkdir(parents=True, exist_ok=True)
        # A copy, not a hard link: onnx refuses to read weights from a file with several links, so a link would
        # also make the original graph unreadable.
        shutil.copyfile(graph.path.parent / file, destination / file)
    data_types = {tensor.data_type for tensor in model.graph.initializer}
    integer_types = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    return {
        "name": name,
        "slug": slug,
        "file": f"models/{slug}/{graph.path.name}",
        "bytes": graph.file_bytes,
        "kind": "quantised" if data_types & integer_types else "float32",
    }


def _tolerance(kind: str) -> float:
    return FLOAT32_TOLERANCE if kind == "float32" else QUANTISED_TOLERANCE


def _make_cases(graphs: Mapping[str, GraphFacts], config: BenchConfig) -> list[Case]:
    graph = next(iter(graphs.values()))
    vocab_sizes = [other.vocab_size for other in graphs.values() if other.vocab_size is not None]
    if graph.takes_tokens and not vocab_sizes:
        raise InputError(f"no embedding table was found in {graph.path}, so a kit cannot tell which tokens to feed")
    sequences: tuple[int | None, ...] = config.sequence_lengths if graph.takes_tokens else (None,)
    return [
        Case(config.threads, batch, sequence, config.new_tokens, min(vocab_sizes, default=None), config.end_tokens)
        for batch in config.batch_sizes
        for sequence in sequences
    ]


def _record_case(case: Case, graphs: Mapping[str, GraphFacts], slugs: Mapping[str, str], folder: Path) -> Json:
    """Write the inputs of a case and the outputs of each model, and return the case's row of ``kit.json``."""
    name = f"batch{case.batch}" + (f"-seq{case.sequence}" if case.sequence else "")
    data_folder = folder / "data" / name
    data_folder.mkdir(parents=True)

    def save(label: str, array: np.ndarray) -> str:
        np.save(data_folder / f"{label}.npy", array)
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
            inputs = {key: save(key, value) for key, value in feeds.items()}
        names = [output.name for output in session.get_outputs() if not output.name.startswith("present.")]
        outputs = session.run(names, feeds)
        expected[slug] = {key: save(f"expected-{slug}-{key}", value) for key, value in zip(names, outputs, strict=True)}
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
