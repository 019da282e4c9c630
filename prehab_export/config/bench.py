"""How a bench measures. Light to import, so that a command line can build its options from the defaults."""

import math
from dataclasses import dataclass, field

from converters.errors import InputError
from prehab_export.system import available_cores

# Name → ONNX Runtime's own name. Which of them there are depends on the package that is installed.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "nnapi": "NnapiExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}


@dataclass(frozen=True)
class BenchConfig:
    """How to measure. Every pair of a batch size and a length is a case, at each number of threads.

    threads: threads of PyTorch and ONNX Runtime; all cores of this process when not given.
    thread_counts: number of threads to measure at; that of ``threads`` when none is given.
    provider: execution provider of ONNX Runtime to measure on.
    batch_sizes: batch size to measure at.
    sequence_lengths: length to measure at, in tokens; of a decoder that of the prompt. Models that take no tokens have
        none.
    warmup: unmeasured requests of each model before the first round.
    rounds: turns of each model.
    min_seconds: least length of a turn; a request that takes longer is always finished.
    new_tokens: tokens that a decoder generates in a measurement.
    end_tokens: ids that every text ends with and has nowhere else, for models that look for the end; a run finds them.
    timeout_s: seconds that a worker may take for one answer (loading, warming up, or one turn).

    Raises:
        InputError: a value is out of range.
    """

    threads: int = field(default_factory=available_cores)
    thread_counts: tuple[int, ...] = ()
    provider: str = "cpu"
    batch_sizes: tuple[int, ...] = (1,)
    sequence_lengths: tuple[int, ...] = (128,)
    warmup: int = 3
    rounds: int = 20
    min_seconds: float = 0.1
    new_tokens: int = 32
    end_tokens: tuple[int, ...] = ()
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("warmup", 0), ("rounds", 1), ("new_tokens", 1)):
            at_least(name, getattr(self, name), least)
        if self.provider not in PROVIDERS:
            raise InputError(f"provider is {self.provider!r}: give one of {', '.join(PROVIDERS)}")
        for name in ("batch_sizes", "sequence_lengths", "thread_counts"):
            if not getattr(self, name) and name != "thread_counts":
                raise InputError(f"{name} is empty: give at least one")
            for value in getattr(self, name):
                at_least(name, value, 1)
        if not (math.isfinite(self.min_seconds) and self.min_seconds >= 0):
            raise InputError(f"min_seconds is {self.min_seconds}: give 0 or more seconds")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise InputError(f"timeout_s is {self.timeout_s}: give more than 0 seconds")


def check_provider(name: str) -> None:
    """Raises:
    InputError: the ONNX Runtime that is installed has no such provider.
    """
    import onnxruntime

    there = onnxruntime.get_available_providers()
    if PROVIDERS[name] not in there:
        known = [short for short, provider in PROVIDERS.items() if provider in there]
        raise InputError(
            f"the installed ONNX Runtime {onnxruntime.__version__} has no {PROVIDERS[name]}; it has "
            f"{', '.join(known)}; install the package that has it, or take --provider cpu"
        )


def at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is {value!r}: give a whole number, {least} or more")
