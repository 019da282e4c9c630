"""The results of a target on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prehab_export.measurement import Json
from prehab_export.system import result_console


def print_results(results: Json) -> None:
    """Print the cases on stdout, with their speedups over the dense model if it was measured, and the table of threads
    × memory if there is one."""
    device, console = results["device"], result_console()
    table = Table(
        title=f"{results['place']}: {device.get('cpu') or 'unnamed CPU'}, {device.get('runtime')} "
        f"{device.get('runtime_version')}",
        box=SIMPLE_HEAD,
        show_edge=False,
    )
    table.add_column("model")
    compares = bool(results["comparison"])
    for heading in ("case", "threads", "p50 ms", "p95 ms", "peak MB", *(["speedup"] if compares else []), "drift"):
        table.add_column(heading, justify="right")
    speedups = {(row["model"], row["case"], row["threads"]): row for row in results["comparison"]}
    drifts = {(row["model"], row["case"], row["threads"]): row for row in results["drift"]}
    for row in results["cases"]:
        key = (row["model"], row["case"], row["threads"])
        speedup, drift = speedups.get(key), drifts.get(key)
        table.add_row(
            row["model"],
            row["case"],
            str(row["threads"]),
            f"{row['p50_ms']:.2f}",
            f"{row['p95_ms']:.2f}",
            "" if row.get("peak_mb") is None else f"{row['peak_mb']:.0f}",
            *(["" if speedup is None else f"{speedup['speedup']:.2f}×"] if compares else []),
            "" if drift is None else f"{drift['last_third_over_first_third']:.2f}",
        )
    console.print(table)
    if not compares:
        console.print("no speedups: there is no dense graph to compare with")
    if "matrix" in results:
        console.print(_matrix_table(results["matrix"]))


def _matrix_table(matrix: Json) -> Table:
    sizes = list(dict.fromkeys(cell["memory_mb"] for cell in matrix["cells"]))
    table = Table(title=f"p50 ms by memory limit ({matrix['memory_limit']})", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("model")
    for heading in ("threads", *(f"{size:g} MB" for size in sizes), "least MB"):
        table.add_column(heading, justify="right")
    for least in matrix["least"]:
        cells = [
            cell for cell in matrix["cells"] if (cell["model"], cell["threads"]) == (least["model"], least["threads"])
        ]
        figures = [f"{cell['p50_ms']:.2f}" if cell["runs"] else "does not run" for cell in cells]
        table.add_row(least["model"], str(least["threads"]), *figures, f"{least['memory_mb']:.0f}")
    return table
