"""This package's templates, filled in."""

from typing import Any

import jinja2

from converters.onnx.modes import FILE_NAMES


def render(template: str, facts: dict[str, Any]) -> str:
    """A template of this package, filled in; a fact that is missing is an error, not a gap."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prehab_export"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["file_names"] = FILE_NAMES
    environment.filters |= {"metric": _metric, "count": _count, "share": lambda x: f"{100 * x:.1f}%", "mb": _megabytes}
    return environment.get_template(template).render(facts)


def _metric(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:.2f}"


def _count(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:,.0f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB"
