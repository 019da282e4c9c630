"""prehab-export: compress trained transformers into low-rank models that deploy.

Every verb of the command line is an ordinary function here. Names are loaded on first use: importing the package
loads neither torch nor onnxruntime.
"""

from prehab_export.current_folder import is_the_program, leave_current_folder

if is_the_program():  # before anything else is imported, which might lie in the current folder
    leave_current_folder()

from importlib import import_module
from typing import Any

_HOME = {
    "BenchConfig": "prehab_export.bench_config",
    "CalibrateConfig": "prehab_export.config",
    "DataConfig": "prehab_export.config",
    "Factors": "converters.lowrank",
    "InputError": "converters.errors",
    "LowRankLinear": "converters.lowrank",
    "ParityError": "prehab_export.errors",
    "StorageError": "prehab_export.errors",
    "PrehabConfig": "prehab_export.config",
    "RefineConfig": "prehab_export.config",
    "RefineSchedule": "prehab_export.config",
    "RehabConfig": "prehab_export.config",
    "RunConfig": "prehab_export.config",
    "Samplesets": "prehab_export.compression",
    "Schedule": "prehab_export.config",
    "Statistics": "prehab_export.statistics",
    "TASKS": "prehab_export.tasks",
    "TrainConfig": "prehab_export.config",
    "TruncateConfig": "prehab_export.config",
    "Budget": "prehab_export.budget",
    "BudgetError": "prehab_export.errors",
    "FitRequest": "prehab_export.fitting",
    "bench": "prehab_export.benchmark",
    "calibrate": "prehab_export.calibration",
    "cast_weights": "converters.dtypes",
    "compress": "prehab_export.compression",
    "coverage": "converters.coverage",
    "densify": "converters.lowrank",
    "evaluate": "prehab_export.evaluation",
    "export_onnx": "converters.onnx.export",
    "fit": "prehab_export.fitting",
    "factorize": "converters.lowrank",
    "from_pretrained": "converters.folder",
    "inspect_model": "prehab_export.inspection",
    "load_data": "prehab_export.data",
    "load_model": "prehab_export.models",
    "load_processor": "prehab_export.models",
    "load_statistics": "prehab_export.statistics",
    "merge_dense_adapter": "converters.adapters",
    "merge_into_factors": "converters.adapters",
    "merge_lora": "prehab_export.merge",
    "prehab": "prehab_export.prehabilitation",
    "refine": "prehab_export.refinement",
    "register_auto_model": "converters.folder",
    "rehab": "prehab_export.rehabilitation",
    "run": "prehab_export.pipeline",
    "save_folder": "converters.folder",
    "save_statistics": "prehab_export.statistics",
    "sweep": "prehab_export.sweeping",
    "target_layers": "converters.targets",
    "truncate": "prehab_export.truncation",
    "truncate_along": "prehab_export.drift",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
