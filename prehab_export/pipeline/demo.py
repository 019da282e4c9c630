"""The demo: train a small ViT on scikit-learn's digits and run the whole pipeline on it. Nothing is downloaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from converters.folder import save_folder
from prehab_export.compression import Trainable, labelled_loss, train
from prehab_export.config import (
    BenchConfig,
    DataConfig,
    PrehabConfig,
    RehabConfig,
    RunConfig,
    Schedule,
    TrainConfig,
    TruncateConfig,
)
from prehab_export.inputs import TASKS, load_data
from prehab_export.pipeline.running import run
from prehab_export.pipeline.session import held_out_split, prepare_process
from prehab_export.pipeline.workspace import Workspace, stage_key
from prehab_export.system import bar, say

NAME = "vit-digits"
DIGITS = DataConfig("sklearn-digits", batch_size=64)
TRAINING = Schedule(steps=500, batch_size=64, learning_rate=1e-3)
VIT: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "id2label": {digit: str(digit) for digit in range(10)},
    "label2id": {str(digit): digit for digit in range(10)},
}


def run_demo(output: Path, threads: int | None = None) -> Workspace:
    """Train the demo model, compress its layers by 60%, export, verify and measure it, all in ``output``.

    A second call continues an interrupted demo.

    Args:
        output: a new or empty folder, or the folder of an earlier demo.
        threads: CPU threads; None for the default of `BenchConfig`.

    Raises:
        InputError: ``output`` holds something other than a run.
    """
    bench = BenchConfig() if threads is None else BenchConfig(threads=threads)
    config = RunConfig(
        model="",
        task="image-classification",
        data=DIGITS,
        truncate=TruncateConfig(ratio=0.6),
        prehab=PrehabConfig(train=TrainConfig(steps=60, learning_rate=1e-4), strength=10.0),
        rehab=RehabConfig(train=TrainConfig(steps=60, learning_rate=1e-4)),
        bench=bench,
    )
    prepare_process(config)
    workspace = Workspace.open(output)
    key = stage_key("dense", {"vit": VIT, "training": vars(TRAINING), "threads": bench.threads})
    with workspace.locked():
        if workspace.find("dense", key) is None:
            say("a small ViT on digits", style="bold")
            with workspace.publish("dense", key, VIT) as folder:
                _train_vit(folder / NAME)
        workspace.select("dense", key)
        workspace.save_selection()
    return run(replace(config, model=str(workspace.folder("dense").resolve() / NAME)), output)


def _train_vit(folder: Path) -> None:
    torch.manual_seed(0)
    task = TASKS["image-classification"]
    model = ViTForImageClassification(ViTConfig(**VIT))
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    data = load_data(DIGITS, task, processor, model.config, seed=0)
    _, training = held_out_split(data.train, seed=0)  # never train on samples that the run holds out
    train(Trainable(model, list(model.parameters())), training, TRAINING, labelled_loss(task), progress=bar)
    save_folder(model, folder, processor)
