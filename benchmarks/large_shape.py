"""Calibration and truncation of a model of LLaMA-2-7B's shape, block by block: seconds, memory and disk.

    python benchmarks/large_shape.py shape --blocks 4 --out benchmarks/results/large-shape.json

The folder is written block by block, with random bfloat16 weights, if it does not exist yet. Tokens are random too, so
nothing is said about accuracy. Time and memory depend on shapes alone. The times of single steps come from the
progress that calibration and truncation report; what no block causes (embeddings, head, loss, the trial of the blocks)
are the *ends*. ``whole`` is (blocks of the full model) × (seconds a block) + ends. Truncation follows calibration in a
process of its own, as in a run.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from scale import peaks
from transformers import LlamaConfig

from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.calibration import Gather, calibrate
from prehab_export.compression.decompositions import decompose_layers
from prehab_export.compression.drift import truncate_along
from prehab_export.compression.moment_files import load_statistics
from prehab_export.compression.spool import Folders
from prehab_export.compression.truncation import plan_truncation
from prehab_export.config.truncate import TruncateConfig
from prehab_export.inputs.models import empty_model, load_model
from prehab_export.inputs.tasks import TASKS
from prehab_export.system.heap import keep_freed_memory
from prehab_export.system.machine import machine_facts

TASK = TASKS["text-generation"]
STEPS = ("calibrate", "truncate")


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--blocks", type=int, default=4, help="Blocks of the model that is written and measured.")
@click.option("--full-blocks", type=int, default=32, help="Blocks of the full model.")
@click.option("--width", type=int, default=4096)
@click.option("--inner", type=int, default=11008, help="Width inside the MLP.")
@click.option("--heads", type=int, default=32)
@click.option("--vocabulary", type=int, default=32000)
@click.option("--windows", type=int, default=16)
@click.option("--length", type=int, default=512, help="Tokens in a window.")
@click.option("--ratio", type=float, default=0.4)
@click.option("--threads", type=int, default=2)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--step", type=click.Choice(STEPS), hidden=True, help="Do this step in this process, and print its row.")
def main(folder: Path, out: Path, step: str | None, **options: Any) -> None:
    model = folder / "model"
    if step is not None:
        torch.set_num_threads(options["threads"])
        keep_freed_memory()  # as the program does
        print(json.dumps((_calibrate if step == "calibrate" else _truncate)(folder, options)))
        return
    if not (model / "config.json").is_file():
        _write(model, options)
    for name in ("moments", "factors", "scratch"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "scratch").mkdir()
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/large_shape.py", *sys.argv[1:]]),
        "machine": machine_facts(),
        "options": options,
        "weights_mb": _size(model),
    }
    for name in STEPS:
        command = [sys.executable, __file__, *sys.argv[1:], "--step", name]
        result[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    result["moments_mb"], result["factors_mb"] = _size(folder / "moments"), _size(folder / "factors")
    a_block = sum(result[name]["seconds_a_block"] for name in STEPS)
    ends = sum(result[name]["ends_s"] for name in STEPS)
    result["whole"] = {
        "seconds_a_block": a_block,
        "ends_s": ends,
        "hours": (options["full_blocks"] * a_block + ends) / 3600,
    }
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _config(options: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=options["width"],
        intermediate_size=options["inner"],
        num_hidden_layers=options["blocks"],
        num_attention_heads=options["heads"],
        vocab_size=options["vocabulary"],
        dtype="bfloat16",
    )


def _write(folder: Path, options: dict[str, Any]) -> None:
    """Write the model one shard for each block and one for the rest, so that no two of them are in memory together."""
    folder.mkdir(parents=True)
    config, generator = _config(options), torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in empty_model(config, TASK).state_dict().items()}
    shards: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        parts = name.split(".")
        shards[parts[2] if parts[1] == "layers" else "ends"].append(name)
    weight_map = {}
    for shard, names in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = {}
        for name in names:
            if len(shapes[name]) == 1:
                tensors[name] = torch.ones(shapes[name], dtype=torch.bfloat16)
            else:
                tensors[name] = (torch.randn(shapes[name], generator=generator) * 0.02).bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def _calibrate(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    with peaks(row):
        start = time.perf_counter()
        model = load_model(str(folder / "model"), TASK, dtype=None)
        row["load_s"] = time.perf_counter() - start
        watch = _Watch()
        gather = Gather(scratch=folder / "scratch", save_to=folder / "moments")
        calibrate(model, TASK, _batches(options), gather=gather, progress=watch)
        row["seconds"] = time.perf_counter() - start
    blocks, windows = options["blocks"], options["windows"]
    steps = [seconds for count, seconds in watch.steps["calibrate"] for _ in range(count)]
    a_batch = len(steps) // (1 + 2 * blocks)
    in_blocks = sum(steps) - sum(steps[blocks * a_batch : (blocks + 1) * a_batch])
    return row | _shared_out(row["seconds"], in_blocks, blocks) | {"tokens": windows * options["length"]}


def _truncate(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    with peaks(row):
        start = time.perf_counter()
        model = load_model(str(folder / "model"), TASK, dtype=None)
        calibrated = Calibrated(model, TASK, load_statistics(folder / "moments"))
        watch, config = _Watch(), TruncateConfig(ratio=options["ratio"])
        row["load_s"] = time.perf_counter() - start
        decomposed = decompose_layers(calibrated, config, progress=watch)
        planned = plan_truncation(calibrated, config, decomposed)
        row["plan_s"] = time.perf_counter() - start - row["load_s"]
        truncate_along(
            calibrated,
            _batches(options),
            planned,
            gradient_shrinkage=config.gradient_shrinkage,
            folders=Folders(folder / "scratch", folder / "factors"),
            progress=watch,
        )
        row["seconds"] = time.perf_counter() - start
    # The plan is all of layers and of groups of layers, which report no progress.
    in_blocks = row["plan_s"] + sum(seconds for _, seconds in watch.steps["truncate"])
    return row | _shared_out(row["seconds"], in_blocks, options["blocks"])


def _shared_out(seconds: float, in_blocks: float, blocks: int) -> dict[str, float]:
    return {"seconds_a_block": in_blocks / blocks, "ends_s": seconds - in_blocks}


def _batches(options: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (options["windows"], options["length"])
    return [{"input_ids": torch.randint(options["vocabulary"], shape, generator=generator)}]


class _Watch:
    """A progress that notes the seconds of every step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[tuple[int, float]]] = defaultdict(list)

    @contextmanager
    def __call__(self, description: str, _total: int) -> Iterator[Callable[..., None]]:
        latest = time.perf_counter()

        def advance(amount: int = 1, note: str = "") -> None:
            nonlocal latest
            now = time.perf_counter()
            self.steps[description].append((amount, now - latest))
            latest = now

        yield advance


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    main()
