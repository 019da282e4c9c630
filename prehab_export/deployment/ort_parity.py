"""Compares the outputs of an ``.ort`` file with those of the ONNX graph it was made from."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from converters.onnx.runtime import open_session
from prehab_export.inputs import Batch, feeds_of

# Both files run the same kernels on the same machine; optimising beforehand may still change the order of a sum.
TOLERANCE = 1e-4
SAMPLES = 8


def largest_difference(graph: Path, ort: Path, batches: Iterable[Batch], threads: int) -> float:
    """Return the largest difference between the logits of the two files, relative to the largest logit of the graph.

    Both multiply 8-bit numbers as this processor does by default, since an ``.ort`` file cannot do otherwise.
    """
    graph_session, ort_session = (open_session(path, threads, exact_int8=False) for path in (graph, ort))
    inputs: list[Any] = graph_session.get_inputs()
    worst = 0.0
    for batch in batches:
        feeds = feeds_of(inputs, batch)
        expected, actual = (
            np.asarray(session.run(["logits"], feeds)[0], np.float64) for session in (graph_session, ort_session)
        )
        worst = max(worst, float(np.abs(actual - expected).max() / np.abs(expected).max()))
    return worst
