"""A quick measurement of this machine's current speed."""

import time
from dataclasses import dataclass

import torch

# Shape of the timed products (ROWS×WIDTH by WIDTH×WIDTH), and the duration of each timing.
ROWS, WIDTH, SECONDS = 1024, 512, 0.1
# Iterations of an empty loop per second on the machine where the fixed times were measured (two cores of an AMD EPYC).
REFERENCE_LOOPS = 1.0e8


@dataclass(frozen=True)
class Pace:
    """The speed of a machine.

    float32, float64: operations per second of matrix products on the device.
    slowness: the time of everything else over its time on the machine of `REFERENCE_LOOPS`.
    """

    float32: float
    float64: float
    slowness: float


def measure_pace(device: torch.device) -> Pace:
    """Measure the pace of this machine with matrix products on the device and a Python loop, in about 0.3 seconds."""
    float32, float64 = (_product_rate(dtype, device) for dtype in (torch.float32, torch.float64))
    return Pace(float32, float64, REFERENCE_LOOPS / _loop_rate())


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((ROWS, WIDTH), (WIDTH, WIDTH)))
    _wait_for(a @ b)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < SECONDS:
        _wait_for(a @ b)
        count += 1
    return 2 * ROWS * WIDTH * WIDTH * count / elapsed


def _wait_for(result: torch.Tensor) -> None:
    result[0, 0].item()  # copying a number from a GPU waits for the product


def _loop_rate() -> float:
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < SECONDS / 2:
        for _ in range(10_000):
            pass
        count += 10_000
    return count / elapsed
