"""Counts and times of the operators of a request, from the events of ONNX Runtime's profiler."""

from typing import Any

import numpy as np

from prehab_export.measurement.kernel_cost import event_multiply_adds


def kernel_times(events: list[dict[str, Any]], steps: int) -> dict[str, list[dict[str, Any]]]:
    """Return the operators of each phase of a request, slowest first.

    Args:
        events: events that ONNX Runtime's profiler has written.
        steps: number of session runs in each request after the first.

    Returns:
        Phase → rows with the keys ``op``, ``count``, ``ms`` (milliseconds) and ``gflop``. They are medians over the
        runs of the phase. The first request is left out.
    """
    runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == "model_run")
    kernels = sorted(
        (event["ts"], event["args"]["op_name"], event["dur"], event_multiply_adds(event["args"]))
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )
    runs_by_phase: dict[str, list[dict[str, list[tuple[float, int]]]]] = {}
    index = 0
    for number, (start, end) in enumerate(runs):
        run_kernels: dict[str, list[tuple[float, int]]] = {}  # operator → (milliseconds, multiply-adds) of each kernel
        while index < len(kernels) and kernels[index][0] <= end:
            timestamp, op, duration, products = kernels[index]
            if timestamp >= start:
                run_kernels.setdefault(op, []).append((duration / 1e3, products))
            index += 1
        if number > steps:  # skips the first request, in which ONNX Runtime plans its memory
            phase = "request" if not steps else "next_token" if number % (steps + 1) else "first_token"
            runs_by_phase.setdefault(phase, []).append(run_kernels)
    return {phase: _operator_medians(phase_runs) for phase, phase_runs in runs_by_phase.items()}


def _operator_medians(runs: list[dict[str, list[tuple[float, int]]]]) -> list[dict[str, Any]]:
    ops = {op for run in runs for op in run}
    rows = [
        {
            "op": op,
            "count": int(np.median([len(run.get(op, ())) for run in runs])),
            "ms": float(np.median([sum(ms for ms, _ in run.get(op, ())) for run in runs])),
            "gflop": 2e-9 * float(np.median([sum(products for _, products in run.get(op, ())) for run in runs])),
        }
        for op in ops
    ]
    return sorted(rows, key=lambda row: -row["ms"])
