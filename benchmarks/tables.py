"""Markdown tables of results: of ``quality.py`` recipes by ratio, mean ± spread over seeds; of ``latency.py`` cases.

python benchmarks/tables.py benchmarks/results/quality-*.json
python benchmarks/tables.py benchmarks/results/latency-*.json
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

import click


@click.command(help=__doc__)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    for file in files:
        result = json.loads(file.read_text())
        click.echo(latencies(result, file.stem) if "runs" in result else table(result, file.stem))


def table(result: dict, name: str) -> str:
    """Spread is half the range over seeds; a recipe that does not train has one seed and none."""
    values: dict[tuple[str, float], list[float]] = defaultdict(list)
    steps: dict[str, int] = {}
    for row in result["rows"]:
        values[row["recipe"], row["ratio"]].append(row["value"])
        steps[row["recipe"]] = row["steps"]
    ratios = sorted({ratio for _, ratio in values})
    dense = result["dense"]
    digits = 4 if dense["metric"] == "accuracy" else 2
    lines = [
        [f"{name}: {dense['metric']}, dense {dense['value']:.{digits}f}", "steps", *(f"{r:.0%}" for r in ratios)],
        ["---", "---:", *["---:"] * len(ratios)],
    ]
    for recipe in dict.fromkeys(recipe for recipe, _ in values):
        cells = [_cell(values.get((recipe, ratio), []), digits) for ratio in ratios]
        lines.append([recipe, str(steps[recipe] or ""), *cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def latencies(result: dict, name: str) -> str:
    """One row a graph and case; ``×`` are speed-ups, of decoders in tokens a second."""
    heading = [
        name,
        "threads",
        "batch",
        "length",
        "ms",
        "× dense",
        "of ideal",
        "× dense int8",
        "anonymous MB",
        "file MB",
    ]
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)]]
    for run in result["runs"]:
        cases = {(row["model"], row["batch"], row["sequence"]): row for row in run["cases"]}
        compared = {(row["model"], row["batch"], row["sequence"]): row for row in run["comparison"]}
        for key, case in cases.items():
            row, dense, int8 = compared.get(key, {}), cases["dense", *key[1:]], cases.get(("dense int8", *key[1:]))
            share = row.get("of_ideal") or row.get("of_bytes")
            lines.append(
                [
                    key[0], str(case["threads"]), str(key[1]), str(key[2] or ""), f"{case['p50_ms']:.1f}",
                    f"{_faster(dense, case):.2f}", "" if share is None else f"{share:.2f}",
                    "" if int8 is None else f"{_faster(int8, case):.2f}", f"{case['peak_anonymous_mb']:.0f}",
                    f"{case['file_mb']:.0f}",
                ]
            )  # fmt: skip
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _faster(base: dict, case: dict) -> float:
    if case["tokens_per_s"] is not None:
        return case["tokens_per_s"] / base["tokens_per_s"]
    return base["p50_ms"] / case["p50_ms"]


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
