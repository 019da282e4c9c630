"""Tells how large a calibration sample has to be, from the moments of a small one."""

from math import ceil, isfinite

from prehab_export.compression.moments import Statistics


def needed_samples(statistics: Statistics) -> int:
    """Return the number of samples that make every input of n features worth n independent tokens.

    With fewer, the covariance of some input is singular in all but name. The worth of a sample is the mean of those
    behind ``statistics`` (see ``Sampling.effective_tokens``: Kish's design effect on the error of the covariance), so
    the answer is as good as that sample is typical. It is 1 if the worth is unknown or nothing varies.
    """
    needed = 1
    for moment in statistics.inputs.values():
        effective = moment.sampling.effective_tokens
        if effective is not None and isfinite(effective) and effective > 0:
            worth = effective / moment.sampling.samples
            needed = max(needed, ceil(moment.mean.numel() / worth))
    return needed
