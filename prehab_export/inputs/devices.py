"""Decides on which device and in which number format a model runs; no other module does.

The device is the one that holds the model's weights; batches and moments follow it. The precision belongs to the task
(``Task.precision``): the forward pass runs under autocast, while the weights and everything measured or decomposed stay
float32. Hooks run inside the forward pass, so ``full_precision`` takes their computations out of autocast.

Autocast and gradient scaling are PyTorch's own. ``accelerate.Accelerator`` does not fit: it wraps the whole model, but
here blocks run one by one; it has one precision per process; and on a CPU, where this is tested, it has no float16.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from converters.dtypes import DTYPES
from converters.errors import InputError
from prehab_export.config import check_device_name
from prehab_export.system import everyone, local_rank


def choose_device(name: str, precision: str = "float32") -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is the first CUDA device, else the CPU.

    Of several processes on a machine, each has the CUDA device of its own number.

    Raises:
        InputError: the name is unknown, there is no such device, its hardware does not support this precision, or
            several processes were started for one device.
    """
    check_device_name(name)
    if ":" in name and everyone().size > 1:
        raise InputError(f"--device {name} is one device, but there are several processes; use --device cuda, or auto")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or local_rank())
    if index >= count:
        available = f"CUDA devices here: {count}, numbered from 0" if count else "PyTorch finds no CUDA device here"
        raise InputError(f"--device {name}: {available}; use --device cpu, or auto")
    if precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"--precision bfloat16: the device {name} does not support it; use float16 or float32")
    return torch.device("cuda", index)


def prepare_determinism() -> None:
    """Make runs reproducible as far as the device allows, and make float32 mean float32 in convolutions too.

    Call this before CUDA is first used, because cuBLAS reads its workspace setting then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False


def device_of(model: nn.Module) -> torch.device:
    """Return the device that holds the model's weights."""
    return next(model.parameters()).device


def room_for(size: int, device: torch.device) -> torch.device:
    """Return the device on which to keep ``size`` bytes in addition to a model on ``device``.

    This is ``device`` itself if the bytes fill at most half of its free memory, otherwise the CPU. A LLaMA's moments
    are more than twice as large as its weights.
    """
    if device.type != "cuda" or 2 * size <= torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch, with labels and masks, to the device; tensors that are already there are not copied."""
    return send_to_device(dict(batch), device)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Run forward passes inside this context in ``precision``; ``float32`` changes nothing."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Compute products inside this context in their operands' own dtype, even in a forward pass under autocast."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def gradient_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Return a scaler that keeps float16 gradients from vanishing, and does nothing in other precisions.

    The method is that of Micikevicius et al. 2018 (arXiv 1710.03740).
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")
