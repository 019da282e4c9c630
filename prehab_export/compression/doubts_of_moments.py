"""What to tell the user about moments that are valid but could say more."""

from collections.abc import Sequence

from converters.roots import weighs
from prehab_export.compression.moments import Statistics


def doubts(statistics: Statistics) -> list[str]:
    """Return warnings, as sentences, about moments that are valid but could be better."""
    messages = [few_tokens(statistics)]
    gradients = statistics.gradients
    silent = [name for name in statistics.groups if name in gradients and not weighs(gradients[name])]
    if silent and len(silent) == len(gradients):
        messages.append(
            "no layer affects the loss on this sample (is the head all zeros?): layers are truncated as with "
            "`--objective activation --allocation uniform`"
        )
    elif silent:
        messages.append(f"{_have(silent)} no effect on the loss on this sample, so any error there counts as zero")
    constant = [group for group, moment in statistics.inputs.items() if not weighs(moment.centred())]
    if constant:
        messages.append(f"{_have(constant)} the same input for every token of this sample")
    return [message for message in messages if message is not None]


def _have(names: Sequence[str]) -> str:
    """Return the subject of a sentence about these layers, with its verb."""
    return f"{names[0]} has" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more have"


def few_tokens(statistics: Statistics) -> str | None:
    """Return a warning if a layer has more inputs than the sample is worth independent tokens, else None."""
    effective_tokens = {group: moment.sampling.effective_tokens for group, moment in statistics.inputs.items()}
    short = {
        group: effective
        for group, effective in effective_tokens.items()
        if effective is not None and effective < statistics.inputs[group].mean.numel()
    }
    if not short:
        return None
    # Report the widest gap.
    group, effective = min(short.items(), key=lambda item: item[1] / statistics.inputs[item[0]].mean.numel())
    moment = statistics.inputs[group]
    return (
        f"calibration ({moment.sampling.samples} samples, {moment.tokens} tokens) is worth "
        f"{effective:.0f} independent tokens for the {moment.mean.numel()} inputs of {group}"
        + (f" (and too few for {len(short) - 1} more)" if len(short) > 1 else "")
        + "; the result is valid, but more samples would give a better one"
    )
