"""Operators of a request: how often each ran and what it took, from what ONNX Runtime's profiler notes."""

from typing import Any

import numpy as np

from prehab_export.measurement.kernel_cost import of_event


def kernel_times(events: list[dict[str, Any]], steps: int) -> dict[str, list[dict[str, Any]]]:
    """Phase → operators by falling time: ``op``, its ``count``, median milliseconds ``ms`` and ``gflop`` in one run.

    Args:
        events: as ONNX Runtime's profiler writes them.
        steps: runs of the session after the first one of each request.
    """
    runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == "model_run")
    kernels = sorted(
        (event["ts"], event["args"]["op_name"], event["dur"], of_event(event["args"]))
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )
    by_phase: dict[str, list[dict[str, list[tuple[float, int]]]]] = {}
    at = 0
    for number, (start, end) in enumerate(runs):
        own: dict[str, list[tuple[float, int]]] = {}
        while at < len(kernels) and kernels[at][0] <= end:
            when, op, took, products = kernels[at]
            if when >= start:
                own.setdefault(op, []).append((took / 1e3, products))
            at += 1
        if number > steps:  # all but the first request
            phase = "request" if not steps else "next_token" if number % (steps + 1) else "first_token"
            by_phase.setdefault(phase, []).append(own)
    return {phase: _medians(of_runs) for phase, of_runs in by_phase.items()}


def _medians(runs: list[dict[str, list[tuple[float, int]]]]) -> list[dict[str, Any]]:
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
