"""How fast this machine is, right now: measured in a fraction of a second."""

import time
from dataclasses import dataclass

import torch

# Of the products that are timed, and of each of the two timings.
ROWS, WIDTH, SECONDS = 1024, 512, 0.1
# Turns of an empty loop a second on the machine on which the fixed times were taken (two cores of an AMD EPYC).
REFERENCE_LOOPS = 1.0e8


@dataclass(frozen=True)
class Pace:
    """float32, float64: operations a second in products of matrices, on the device and on the CPU. slowness: how much
    longer all else takes than on the machine on which fixed times were taken."""

    float32: float
    float64: float
    slowness: float


def measured_pace(device: torch.device) -> Pace:
    return Pace(_products(torch.float32, device), _products(torch.float64, device), REFERENCE_LOOPS / _loops())


def _products(dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((ROWS, WIDTH), (WIDTH, WIDTH)))
    _finish(a @ b)
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < SECONDS:
        _finish(a @ b)
        count += 1
    return 2 * ROWS * WIDTH * WIDTH * count / passed


def _finish(result: torch.Tensor) -> None:
    result[0, 0].item()  # a GPU is waited for


def _loops() -> float:
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < SECONDS / 2:
        for _ in range(10_000):
            pass
        count += 10_000
    return count / passed
