"""The result of merging an adapter, on the terminal."""

from typing import Any

from prehab_export.system import result_console


def print_merge(facts: dict[str, Any]) -> None:
    """Print the merged layers, their largest error and the new graphs on stdout."""
    console = result_console()
    layers = facts["layers"]
    inexact = {name: layer["error"] for name, layer in layers.items() if not layer["exact"]}
    console.print(f"merged {facts['adapter']} into {facts['artifact']}: {len(layers)} layers")
    if inexact:
        worst = max(inexact, key=lambda name: inexact[name])
        console.print(
            f"{len(inexact)} were truncated to their rank ({facts['metric']} metric); "
            f"largest relative error {inexact[worst]:.3f}, at {worst}"
        )
    if facts["graphs"]:
        console.print(f"graphs: {', '.join(facts['graphs'])}")
    for row in facts["left_out"]:
        console.print(f"left out: {row['file']} ({row['reason']})", markup=False)
