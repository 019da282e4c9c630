"""The figures that method and code must reach on real models; needs the folder of shared models beside the checkout."""

from pathlib import Path

import pytest

import prehab_export as px
from prehab_export.compression.calibrated import Calibrated
from prehab_export.compression.decompositions import decompose_layers
from prehab_export.compression.training import frozen_copy
from prehab_export.inputs.evaluation import torch_predictor

SHARED = Path(__file__).resolve().parents[2] / "shared"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the shared models are not beside this checkout"),
    pytest.mark.timeout(1800),
]

CASES = {
    "minilm-sst2": ("text-classification", "sst2", "validation+test", 32),
    "vit-cifar10": ("image-classification", "cifar10", "test", 64),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    task_name, data, split, batch_size = CASES[request.param]
    task = px.TASKS[task_name]
    folder = str(SHARED / "models" / request.param)
    model, processor = px.load_model(folder, task), px.load_processor(folder, task)
    config = px.DataConfig(str(SHARED / "data" / data), eval_split=split)
    samples = px.load_data(config, task, processor, model.config, seed=0)
    layers = px.select_layers(model)
    calibration = samples.train.subset(512, seed=0).batches(batch_size)
    return request.param, model, task, samples, px.calibrate(model, task, calibration, layers).statistics


def accuracy(model, task, samples):
    return px.evaluate(torch_predictor(model, task), task, samples.evaluation.batches(64)).value


# model → objective, allocation, ratio → least and most accuracy
FIGURES = {
    "minilm-sst2": {
        ("fisher", "loss", 0.6): (0.870, 1),
        ("fisher", "loss", 0.8): (0.860, 1),
        ("activation", "uniform", 0.6): (0.844, 0.854),
    },
    "vit-cifar10": {("fisher", "loss", 0.9): (0.675, 1), ("activation", "uniform", 0.9): (0.497, 0.537)},
}


def test_accuracy_without_training(case):
    name, model, task, samples, statistics = case
    for (objective, allocation, ratio), (least, most) in FIGURES[name].items():
        config = px.TruncateConfig(ratio=ratio, objective=objective, allocation=allocation)
        candidate = frozen_copy(model)
        decomposed = decompose_layers(Calibrated(model, task, statistics), config)
        px.factorize(candidate, px.truncate(Calibrated(model, task, statistics), config, decomposed=decomposed).factors)
        assert least <= accuracy(candidate, task, samples) <= most, (objective, allocation, ratio)
