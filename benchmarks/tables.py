"""A Markdown table of one or more results of ``quality.py``: recipes by ratio, mean ± spread over seeds.

python benchmarks/tables.py benchmarks/results/quality-*.json
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
        click.echo(table(json.loads(file.read_text()), file.stem))


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


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
