"""Peak memory of writing an ONNX graph, against the size of the model: full-size shapes with random weights.

    python benchmarks/export_memory.py --out benchmarks/results/export-memory.json

One fresh process a model. What Python and its libraries hold before the model is made is left out; the model itself is
counted, so that 1 would be an export for nothing. Peaks are resident memory, sampled by the kernel (VmHWM).
"""

import ctypes
import gc
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from latency import SHAPES, build, cut

from converters.onnx.export import export_onnx
from prehab_export.pipeline.session import quiet_libraries
from prehab_export.system.machine import machine_facts


@click.command(help=__doc__)
@click.option("--shape", "shapes", type=click.Choice(list(SHAPES)), multiple=True, default=tuple(SHAPES))
@click.option("--removed", type=float, multiple=True, default=(0.0, 0.6))
@click.option("--child", is_flag=True, hidden=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(shapes: tuple[str, ...], removed: tuple[float, ...], child: bool, out: Path | None) -> None:
    if child:
        click.echo(json.dumps(measured(shapes[0], removed[0])))
        return
    rows = []
    for shape in shapes:
        for share in removed:
            own = [sys.executable, __file__, "--child", "--shape", shape, "--removed", str(share)]
            lines = subprocess.run(own, check=True, capture_output=True, text=True).stdout.splitlines()
            rows.append(json.loads(lines[-1]))
            click.echo(rows[-1], err=True)
    result = {
        "command": shlex.join(["python", "benchmarks/export_memory.py", *sys.argv[1:]]),
        "machine": machine_facts(),
        "rows": rows,
    }
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


def measured(shape: str, removed: float) -> dict:
    quiet_libraries()
    # Everything that an export imports is imported by an export.
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(build(shape, 1, tiny=True), SHAPES[shape][0], Path(folder, "model.onnx"))
    before = resident("VmRSS")
    model = build(shape, None)
    if removed:
        cut(model, removed, 16)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the dense weights took goes back to the system
    size = sum(parameter.nbytes for parameter in {id(p): p for p in model.parameters()}.values())
    made = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    with tempfile.TemporaryDirectory() as folder:
        written = export_onnx(model, SHAPES[shape][0], Path(folder, "model.onnx"))
    peak = resident("VmHWM") - before
    return {
        "shape": shape,
        "removed": removed,
        "model_mb": size / 1e6,
        "file_mb": written.bytes / 1e6,
        "resident_before_export_mb": (made - before) / 1e6,
        "peak_mb": peak / 1e6,
        "peak_over_model": peak / size,
    }


def resident(entry: str) -> int:
    """Bytes, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])


if __name__ == "__main__":
    main()
