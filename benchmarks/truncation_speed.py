"""Truncation of one large layer: ours against the SVD-LLM way, in one run.

    python benchmarks/truncation_speed.py --threads 2 --out benchmarks/results/truncation-speed.json

Timed, on both sides: from W and C to the two factors at the highest asked rank; lower ranks are slices of them. Ours:
``decompose`` with the ``activation`` objective and that rank as ``most``. SVD-LLM's published code: Cholesky factor L
of C and its inverse in float64, SVD of W L in float32. Processor seconds stand beside the clock's: on a machine that is
shared they say more. The objective tr(Δ C Δᵀ) of both, as stored in the weight's dtype, is taken in float64. W and C
are random, C from correlated tokens whose variances decay over six decades. ``--all-ranks`` times ours for every rank
too, ``--fisher`` the two-sided objective.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor

from converters.roots import damped
from prehab_export.linalg.decomposition import decompose, objective_value
from prehab_export.system.machine import machine_facts

Factors = Callable[[int], tuple[Tensor, Tensor]]


@click.command(help=__doc__)
@click.option("--shape", "shapes", multiple=True, default=("4096x4096", "11008x4096"), help="OUTxIN; repeatable.")
@click.option("--keep", "keeps", type=float, multiple=True, default=(0.4, 0.2), help="Share of parameters kept.")
@click.option("--repeats", type=int, default=1)
@click.option("--all-ranks/--no-all-ranks", default=False, help="Time our decomposition for every rank as well.")
@click.option("--fisher/--no-fisher", default=False, help="Time the two-sided objective as well.")
@click.option("--threads", type=int, default=2)
@click.option("--device", default="cpu")
@click.option("--seed", type=int, default=0)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(shapes: tuple[str, ...], keeps: tuple[float, ...], out: Path, **options: Any) -> None:
    torch.set_num_threads(options["threads"])
    result = {
        "command": shlex.join(["python", "benchmarks/truncation_speed.py", *sys.argv[1:]]),
        "machine": machine_facts(),
        "options": options,
        "layers": [_layer(shape, keeps, options) for shape in shapes],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


def _layer(shape: str, keeps: tuple[float, ...], options: dict[str, Any]) -> dict[str, Any]:
    m, n = (int(size) for size in shape.split("x"))
    generator = torch.Generator().manual_seed(options["seed"])
    weight = (torch.randn(m, n, generator=generator) / n**0.5).to(options["device"])
    c = _moment(n, generator).to(options["device"])
    most = int(max(keeps) * m * n / (m + n))
    ways: dict[str, Callable[[], Factors]] = {
        "ours": lambda: decompose(weight, c, max_rank=most).truncated,
        "svd-llm": lambda: _svd_llm(weight, c, most),
    }
    if options["all_ranks"]:
        ways["ours-all-ranks"] = lambda: decompose(weight, c).truncated
    if options["fisher"]:
        g = damped(_moment(m, generator), 1e-2).to(options["device"])
        ways["ours-fisher"] = lambda: decompose(weight, c, g, most).truncated
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor_seconds: dict[str, list[float]] = {name: [] for name in ways}
    factors: dict[str, Factors] = {}
    for _ in range(options["repeats"]):
        for name, way in ways.items():
            started, spent = _now(weight), time.process_time()
            factors[name] = way()
            seconds[name].append(_now(weight) - started)
            processor_seconds[name].append(time.process_time() - spent)
    row: dict[str, Any] = {
        "shape": shape,
        "rank": most,
        "seconds": {name: median(times) for name, times in seconds.items()},
        "processor_seconds": {name: median(times) for name, times in processor_seconds.items()},
    }
    for clock in ("seconds", "processor_seconds"):
        row[f"svd-llm_over_ours_{clock}"] = row[clock]["svd-llm"] / row[clock]["ours"]
    row["ranks"] = [_compared(weight, c, factors, keep) for keep in keeps]
    click.echo(json.dumps(row), err=True)
    return row


def _compared(weight: Tensor, c: Tensor, factors: dict[str, Factors], keep: float) -> dict[str, Any]:
    m, n = weight.shape
    rank = int(keep * m * n / (m + n))
    values = {}
    for name in ("ours", "svd-llm"):
        up, down = factors[name](rank)
        # Both in the storage dtype of the weight, as they would be put into the model.
        product = up.to(weight.dtype).double() @ down.to(weight.dtype).double()
        values[name] = objective_value(weight.double() - product, c)
    return {"keep": keep, "rank": rank, "objective": values, "ours_over_svd-llm": values["ours"] / values["svd-llm"]}


def _svd_llm(weight: Tensor, c: Tensor, most: int) -> Factors:
    """The published procedure (arXiv 2403.07378), with its remedy for a C that is not positive definite."""
    moment = c.double()
    factor, info = torch.linalg.cholesky_ex(moment)
    if int(info):
        shift = -torch.linalg.eigvalsh(moment)[0] + 1e-6
        factor = torch.linalg.cholesky(moment + shift * torch.eye(len(moment), dtype=moment.dtype, device=c.device))
    inverse = torch.linalg.inv(factor).float()
    u, sigma, vt = torch.linalg.svd(weight @ factor.float(), full_matrices=False)
    root = sigma[:most].sqrt()
    up, down = u[:, :most] * root, root[:, None] * (vt[:most] @ inverse)
    return lambda rank: (up[:, :rank], down[:rank])


def _moment(n: int, generator: torch.Generator) -> Tensor:
    """E[x xᵀ] in float64 over 4n tokens, each a random mixture of n sources of decaying variance."""
    sources = torch.randn(4 * n, n, generator=generator) * torch.logspace(0, -3, n)
    tokens = sources @ (torch.randn(n, n, generator=generator) / n**0.5)
    return (tokens.T.double() @ tokens.double()) / len(tokens)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
