"""The plots of reports, fits and sweeps."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

# Plots look the same everywhere: they ignore any ``matplotlibrc`` of the user or in the current folder.
_default_style = mpl.rc_context(mpl.rcParamsDefault)


@_default_style
def plot_ranks(layers: list[dict], path: Path) -> None:
    """Plot the share of parameters that each layer keeps, as one bar for each layer, coloured by the layer's role."""
    names = [layer["name"].replace("$", r"\$") for layer in layers]  # a dollar sign would start a formula
    shares = [layer["parameters_after"] / layer["parameters_before"] for layer in layers]
    roles = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    colours = {role: mpl.colormaps["tab10"](index % 10) for index, role in enumerate(roles)}
    figure = Figure(figsize=(8, 1.2 + 0.16 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(names)), shares, color=[colours[name.rsplit(".", 1)[-1]] for name in names])
    for index, layer in enumerate(layers):
        rank = "dense" if layer["rank"] is None else str(layer["rank"])
        axes.text(shares[index], index, f" {rank}", va="center", fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("share of the layer's parameters kept (number: rank)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


@_default_style
def plot_prehab(history: list[dict], metric: str, path: Path) -> None:
    """Plot the task loss, the surrogate and the dense model's metric over the steps, in one panel each."""
    steps = [row["step"] for row in history]
    measured = [row for row in history if f"dense_{metric}" in row]
    panels = (
        ("task loss (training batch)", steps, [row["task_loss"] for row in history], "linear"),
        ("surrogate (1 at the start)", steps, [row["surrogate"] for row in history], "log"),
        (
            f"{metric} of the dense model, held out",
            [row["step"] for row in measured],
            [row[f"dense_{metric}"] for row in measured],
            "linear",
        ),
    )
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, (title, x, y, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(x, y, marker="o" if len(x) < 40 else None, markersize=3)
        axes.set_yscale(scale)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


@_default_style
def plot_sweep(dense: dict, rows: list[dict], path: Path) -> None:
    """Plot the metric against the removed share, with one line for each method and the dense model's value as a
    horizontal line."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense["value"], color="0.5", linestyle=":", label="dense")
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row["ratio"], row["value"]) for row in rows if row["method"] == method)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=method)
    if dense["metric"] == "perplexity":
        axes.set_yscale("log")  # on a linear scale one very bad method would flatten all the others
    axes.set_xlabel("share of the selected parameters removed")
    axes.set_ylabel(dense["metric"])
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


@_default_style
def plot_fit(result: dict, path: Path) -> None:
    """Plot the drop of the metric against the p95 of a request.

    The area of a marker is the file size. Measured candidates are ringed, predicted candidates are faint.
    """
    scale = 100 / max(row["predicted"]["size_mb"] for row in result["candidates"])
    setups = list(dict.fromkeys((row["mode"], row["threads"]) for row in result["candidates"]))
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (mode, threads) in enumerate(setups):
        rows = [row for row in result["candidates"] if (row["mode"], row["threads"]) == (mode, threads)]
        rows.sort(key=lambda row: row["predicted"]["p95_ms"])
        x = [row["predicted"]["p95_ms"] for row in rows]
        y = [100 * row["predicted_drop"] for row in rows]
        colour = mpl.colormaps["tab10"](index % 10)
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.5)
        axes.scatter(x, y, [scale * row["predicted"]["size_mb"] for row in rows], color=colour, alpha=0.35)
        axes.scatter([], [], 40, color=colour, label=f"{mode}, {threads} thread{'s' if threads > 1 else ''}")
        for row in rows:
            if (measured := row["measured"]) is not None:
                edge = "black" if row["recommended"] else "0.5"
                point = (measured["p95_ms"], 100 * measured["drop"])
                area = scale * measured["size_mb"]
                axes.scatter(*point, area, color=colour, edgecolor=edge, linewidth=1.5, zorder=3)
                if row["recommended"]:
                    axes.annotate("recommended", point, (8, 8), textcoords="offset points", fontsize=8)
    axes.set_xlim(left=0)
    axes.set_yscale("symlog", linthresh=1.0)
    # A limit that is far from every model would shrink the rest of the plot.
    limit, drop = result["budget"]["p95_ms"], result["budget"]["max_drop"]
    if limit is not None and limit < axes.get_xlim()[1]:
        axes.axvline(limit, color="0.4", linestyle=":", linewidth=1)
    if drop is not None and 100 * drop < axes.get_ylim()[1]:
        axes.axhline(100 * drop, color="0.4", linestyle=":", linewidth=1)
    axes.set_xlabel("p95 of a request, ms (dotted: the budget)")
    in_points = result["metric"]["metric"] == "accuracy"
    axes.set_ylabel("points of accuracy lost" if in_points else "rise of perplexity, %")
    axes.legend(fontsize=8, title="area: file size; ringed: measured", title_fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


@_default_style
def plot_roofline(bench: dict, path: Path) -> None:
    """Plot operations per second against operations per byte of weights, below the machine's measured ceilings, with
    one panel for each number of threads."""
    figure = Figure(figsize=(1 + 4.5 * len(bench["ceilings"]), 3.8), layout="constrained")
    panels = figure.subplots(1, len(bench["ceilings"]), squeeze=False)[0]
    for axes, peak in zip(panels, bench["ceilings"], strict=True):
        cases = [case for case in bench["cases"] if case["threads"] == peak["threads"] and case["gflop"]]
        model_points: dict[str, list[tuple[float, float]]] = {case["model"]: [] for case in cases}
        for case in cases:
            milliseconds = case["inter_token_p50_ms"] or case["p50_ms"]
            intensity, speed = 1e3 * case["gflop"] / case["weight_mb"], 1e3 * case["gflop"] / milliseconds
            model_points[case["model"]].append((intensity, speed))
        intensities = [x for points in model_points.values() for x, _ in points]
        low, high = 0.3 * min(intensities), 3 * max(intensities)
        for kind, key, style in (("float32", "float32_gflops", "-"), ("int8", "int8_gops", "--")):
            knee = peak[key] / peak["read_gb_s"]
            line = [(x, min(peak[key], x * peak["read_gb_s"])) for x in sorted({low, min(max(knee, low), high), high})]
            axes.plot(*zip(*line, strict=True), style, color="0.4", lw=1, label=f"ceiling, {kind}")
        for model, points in model_points.items():
            axes.scatter(*zip(*points, strict=True), s=28, label=model, zorder=3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations per byte of weights")
        axes.set_ylabel("10⁹ operations per second")
        axes.set_title(f"{peak['threads']} thread(s)", fontsize=9)
        axes.legend(fontsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
