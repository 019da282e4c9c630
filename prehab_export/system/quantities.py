"""Writes estimated quantities for people: a time, an amount of memory."""


def format_duration(seconds: float) -> str:
    """Format a time with two significant digits at most, because it is an estimate.

    >>> [format_duration(seconds) for seconds in (0.4, 47, 400, 12_000, 400_000)]
    ['1 s', '47 s', '7 min', '3.3 h', '110 h']
    """
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 6000:
        return f"{round(seconds / 60)} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{float(f'{hours:.2g}'):.0f} h"


def format_bytes(count: float) -> str:
    """Format an amount of memory or disk space in MB (10⁶ bytes) or GB.

    >>> format_bytes(2_500_000), format_bytes(16e9)
    ('2 MB', '16.0 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
