"""Does an ``.ort`` file answer as the graph that it was made from?"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from converters.onnx.runtime import open_session
from prehab_export.inputs import Batch, feeds_of

# The same kernels on the same machine; optimising beforehand may change the order of a sum.
TOLERANCE = 1e-4
SAMPLES = 8


def largest_difference(graph: Path, ort: Path, batches: Iterable[Batch], threads: int) -> float:
    """The largest difference of the logits of two files of one graph, relative to their scale."""
    ours, theirs = (open_session(path, threads) for path in (graph, ort))
    inputs: list[Any] = ours.get_inputs()
    worst = 0.0
    for batch in batches:
        feeds = feeds_of(inputs, batch)
        expected, found = (np.asarray(one.run(["logits"], feeds)[0], np.float64) for one in (ours, theirs))
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst
