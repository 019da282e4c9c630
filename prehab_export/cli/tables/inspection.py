"""The layers of a model on the terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prehab_export.system import result_console


def print_inspection(facts: dict[str, Any]) -> None:
    """Print the model's parameters and a table of its layers on stdout."""
    console = result_console()
    console.print(f"{facts['model']}: {facts['architecture']}, {facts['task']}")
    console.print(
        f"{facts['parameters']:,} parameters, {facts['selected_parameters']:,} of them "
        f"({100 * facts['selected_share']:.1f}%) in "
        + (f"{facts['layers_factored']} two-factor layers" if facts["layers_factored"] else "layers to compress")
    )
    if facts["warning"] is not None and not facts["layers_factored"]:
        console.print(f"warning: {facts['warning']}", style="yellow")
    headings = ("layer", "out×in", "parameters", "rank", "kept", "shares input with", "stable rank", "99% in")
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in headings:
        is_name = heading in ("layer", "shares input with")
        table.add_column(heading, justify="left" if is_name else "right", overflow="fold")
    for row in facts["layers"]:
        shape = "×".join(map(str, row["shape"]))
        rank = row["rank"] or f"≤ {row['break_even_rank'] - 1}" if row["selected"] else "stays dense"
        group = row.get("input_group")
        shared = group.rsplit(".", 1)[-1] if group and group != row["name"] else ""
        stable_rank = f"{row['stable_rank']:.1f}" if "stable_rank" in row else ""
        energy_rank = str(row.get("rank_of_99_percent", ""))
        share_kept = f"{100 * row['share_kept']:.0f}%"
        table.add_row(
            row["name"], shape, f"{row['parameters']:,}", str(rank), share_kept, shared, stable_rank, energy_rank
        )
    console.print(table)
