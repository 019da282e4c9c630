"""Where a model runs and in which number format: the one place that decides either.

The device is that of the model's weights; batches and moments follow it. The precision is the task's
(``Task.precision``): the forward pass runs under autocast, the weights stay float32, and so does everything measured or
decomposed. Hooks run inside the forward pass, so what they compute is taken out of autocast by ``full_precision``.

Autocast and gradient scaling are PyTorch's own. ``accelerate.Accelerator`` would wrap the whole model, where blocks are
run one by one here; it has one precision a process; and on a CPU, where this is tested, it has no float16.
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


def choose_device(name: str, precision: str = "float32") -> torch.device:
    """The device meant by ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is the first CUDA device, or the CPU.

    Raises:
        InputError: another name, no such device here, or one without hardware support for this precision.
    """
    check_device_name(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        found = f"there are {count}, counted from 0" if count else "PyTorch finds no CUDA device here"
        raise InputError(f"--device {name}: {found}; take --device cpu, or auto")
    if precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"--precision bfloat16: the device {name} cannot compute in it; take float16 or float32")
    return torch.device("cuda", index)


def prepare_determinism() -> None:
    """The same results from the same run, as far as the device can; float32 means float32, in convolutions too.

    To be called before CUDA is first used: cuBLAS reads its workspace setting then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights lie."""
    return next(model.parameters()).device


def room_for(size: int, device: torch.device) -> torch.device:
    """Where to keep ``size`` bytes beside a model on this device: there, if they are at most half of what is free;
    otherwise in main memory. A LLaMA's moments are more than twice its weights."""
    if device.type != "cuda" or 2 * size <= torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch, labels and masks included, on the device; tensors that lie there already are not copied."""
    return send_to_device(dict(batch), device)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Forward passes within compute in ``precision``; ``float32`` changes nothing."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Products within are taken in their operands' own dtype, also in the middle of a forward pass under autocast."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def gradient_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Keeps float16 gradients from vanishing (Micikevicius et al. 2018, arXiv 1710.03740); does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")
