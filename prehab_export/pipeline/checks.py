"""Everything about a run that can be refused or foretold before slow work."""

from dataclasses import replace
from pathlib import Path

from converters.adapters import check_fit
from converters.coverage import LEAST_SHARE, Coverage
from converters.dtypes import DTYPES
from converters.errors import InputError
from converters.lowrank import dense_weight
from converters.model_config import special_tokens
from converters.onnx.write import EXTERNAL_DATA_THRESHOLD
from prehab_export.config import BenchConfig, RunConfig, check_provider
from prehab_export.inputs import check_fit_in, choose_device, longest_input
from prehab_export.pipeline.session import Session
from prehab_export.system import say, warn


def check(session: Session) -> None:
    """Everything that can be refused before slow work is refused here.

    Raises:
        InputError: see the table of bad input in the README.
    """
    choose_device(session.config.device, session.config.precision)
    check_provider(session.config.bench.provider)
    model = session.empty_model
    session.layers(model)  # patterns that match nothing are refused
    _check_share(session.coverage, session.config)
    if session.config.adapter is not None:
        check_fit(model, Path(session.config.adapter))
    for warning in session.data.description["warnings"]:
        warn(warning)
    if not len(session.data.train) or not len(session.data.evaluation):
        raise InputError(
            f"{session.config.data.data} has an empty split; give --train-split and --eval-split with rows"
        )
    if len(session.training) < 2:
        raise InputError(
            f"the training split has {len(session.data.train)} samples, too few to calibrate on and to decide by; "
            "give more data"
        )
    bench_config(session)
    check_fit_in(session.weights, session.artifact_dtype)
    if set(session.weights.dtypes) != {session.artifact_dtype}:
        say(f"weights are {' and '.join(session.weights.dtypes)}; the artifact's will be {session.artifact_dtype}")


def _check_share(found: Coverage, config: RunConfig) -> None:
    """Say which share of the model's parameters is to be compressed, and warn where it is small.

    Raises:
        InputError: hardly any, and nobody named these layers.
    """
    if found.share < LEAST_SHARE and not config.calibrate.include:
        raise InputError(
            f"only {found.sentence()}, so that the model would stay about as large as it is. "
            f"The rest: {found.where_the_rest_lies()}. Name layers with --include to compress those all the same"
            + (", or loosen --exclude" if config.calibrate.exclude else "")
        )
    if found.warning is not None:
        warn(found.warning)
    else:
        say(found.sentence())


def bench_config(session: Session) -> BenchConfig:
    """What to measure, at lengths that the model's positions allow: the default is shortened to fit.

    Raises:
        InputError: a given length is longer than the model takes.
    """
    config = session.config.bench
    if session.config.task == "image-classification":
        return config
    if session.config.task == "text-classification":
        config = replace(config, end_tokens=special_tokens(session.model_config))
    trust = session.config.trust_remote_code
    limit = longest_input(session.model_config, session.task, trust_remote_code=trust)
    generated = config.new_tokens if session.config.task == "text-generation" else 0
    longest = max(config.sequence_lengths)
    if limit is None or longest + generated <= limit:
        return config
    if config.sequence_lengths != BenchConfig().sequence_lengths or limit <= 2 * generated:
        raise InputError(
            f"--bench-length {longest}"
            + (f" and --new-tokens {generated} together are" if generated else " is")
            + f" more than the model's {limit} positions; give smaller ones"
        )
    return replace(config, sequence_lengths=(limit - generated,))


def disk_estimate(session: Session) -> int:
    """Bytes on disk for moments, intermediate models and both ONNX graphs, in float32, and the artifact's weights; a
    little too much."""
    config, model = session.config, session.empty_model
    count = sum(parameter.numel() for parameter in model.parameters())
    shapes = [dense_weight(layer).shape for layer in session.layers(model).values()]
    moments = 4 * sum(n * n + (m * m if config.needs_gradients else 0) for m, n in shapes)
    weights, written = 4 * count, DTYPES[session.artifact_dtype].itemsize * count
    prehabbed = weights + moments if config.prehab.train.steps else 0
    merged = weights if config.adapter else 0
    refitted = 2 * weights if config.quantize and config.quantize_refit else 0  # in float32 and quantised, for a while
    # Weights beside a graph are never links: those of the artifact twice more, those of the dense graph once.
    copies = (3 + len(config.quantize)) * weights if weights >= EXTERNAL_DATA_THRESHOLD else 0
    # Factored model after truncation and rehab, the artifact's graph, the dense graph, and the graph being replaced;
    # the artifact, and the one being replaced.
    return moments + prehabbed + merged + refitted + (5 + len(config.quantize)) * weights + 2 * written + copies
