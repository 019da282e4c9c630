"""Checks of a run's input, and the estimate of its disk use, before slow work begins."""

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
from prehab_export.inputs import check_fit_in, check_fit_model, choose_device, longest_input
from prehab_export.pipeline.session import Session
from prehab_export.system import say, warn


def check(session: Session) -> None:
    """Refuse bad input before slow work begins.

    Raises:
        InputError: the input is bad in one of the ways that the README lists.
    """
    choose_device(session.config.device, session.config.precision)
    check_provider(session.config.bench.provider)
    model = session.empty_model
    session.layers(model)  # raises for patterns that match nothing
    check_fit_model(session.weights, model)
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
            f"the training split has {len(session.data.train)} samples, too few to calibrate and to hold some out; "
            "give more data"
        )
    bench_config(session)
    check_fit_in(session.weights, session.artifact_dtype)
    if set(session.weights.dtypes) != {session.artifact_dtype}:
        say(f"weights are {' and '.join(session.weights.dtypes)}; the artifact's will be {session.artifact_dtype}")


def _check_share(selection: Coverage, config: RunConfig) -> None:
    """Report the share of the model's parameters that the selected layers hold, with a warning if it is small.

    Raises:
        InputError: the share is negligible and the user named no layers.
    """
    if selection.share < LEAST_SHARE and not config.calibrate.include:
        raise InputError(
            f"only {selection.sentence()}, so the model would stay about as large as it is. "
            f"The rest: {selection.where_the_rest_lies()}. Name layers with --include to compress them anyway"
            + (", or loosen --exclude" if config.calibrate.exclude else "")
        )
    if selection.warning is not None:
        warn(selection.warning)
    else:
        say(selection.sentence())


def bench_config(session: Session) -> BenchConfig:
    """Return the run's bench options. The default sequence length is shortened to fit the model's positions.

    Raises:
        InputError: a requested length exceeds the model's positions.
    """
    config = session.config.bench
    if session.config.task == "image-classification":
        return config
    if session.config.task == "text-classification":
        config = replace(config, end_tokens=special_tokens(session.model_config))
    trust = session.config.trust_remote_code
    limit = longest_input(session.model_config, session.task, trust_remote_code=trust)
    new_tokens = config.new_tokens if session.config.task == "text-generation" else 0
    longest = max(config.sequence_lengths)
    if limit is None or longest + new_tokens <= limit:
        return config
    if config.sequence_lengths != BenchConfig().sequence_lengths or limit <= 2 * new_tokens:
        raise InputError(
            f"--bench-length {longest}"
            + (f" and --new-tokens {new_tokens} together are" if new_tokens else " is")
            + f" more than the model's {limit} positions; give "
            + ("smaller values" if new_tokens else "a smaller one")
        )
    return replace(config, sequence_lengths=(limit - new_tokens,))


def disk_needed(session: Session) -> int:
    """Return the bytes that the run takes on disk in addition to the current results, rounded up."""
    workspace = session.workspace
    return max(0, disk_estimate(session) - sum(workspace.size(*result) for result in workspace.current.items()))


def disk_estimate(session: Session) -> int:
    """Return the bytes that the run's results take on disk, rounded up.

    They cover moments, intermediate models and the ONNX graphs in float32, and the artifact's weights.
    """
    config, model = session.config, session.empty_model
    count = sum(parameter.numel() for parameter in model.parameters())
    shapes = [dense_weight(layer).shape for layer in session.layers(model).values()]
    moments = 4 * sum(n * n + (m * m if config.needs_gradients else 0) for m, n in shapes)
    weights, artifact = 4 * count, DTYPES[session.artifact_dtype].itemsize * count
    prehab = weights + moments if config.prehab.train.steps else 0
    merge = weights if config.adapter else 0
    # The refitted graph exists for a while in float32 and quantised.
    refit = 2 * weights if config.quantize and config.quantize_refit else 0
    # External weights of a graph are copied, not linked: the artifact's twice, the dense graph's once.
    dense = 1 if session.missing_dense_graph is None else 0
    copies = (2 + dense + len(config.quantize)) * weights if weights >= EXTERNAL_DATA_THRESHOLD else 0
    # Five float32 models: factored after truncation and after rehab, the artifact's graph, the dense graph if there is
    # one, and the graph being replaced. Two artifacts: the new one and the one being replaced.
    return moments + prehab + merge + refit + (4 + dense + len(config.quantize)) * weights + 2 * artifact + copies
