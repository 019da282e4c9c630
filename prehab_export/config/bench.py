"""Options of the bench. This module imports quickly, because the command line builds its options from the defaults."""

import math
from dataclasses import dataclass, field

from converters.errors import InputError
from prehab_export.system import available_cores

# Short name → ONNX Runtime's name. The installed package decides which providers are available.
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
    """How to measure. Each combination of thread count, batch size and sequence length is one case.

    threads: threads of PyTorch and ONNX Runtime; all cores of this process when not given.
    thread_counts: number of threads to measure with; the value of ``threads`` when not given.
    provider: execution provider of ONNX Runtime to measure on.
    batch_sizes: batch size to measure.
    sequence_lengths: sequence length to measure, in tokens; for a decoder, the length of the prompt. Models that take
        no tokens ignore it.
    warmup: unmeasured requests of each model before the first round.
    rounds: number of turns of each model.
    min_seconds: minimum duration of a turn; the last request is always finished.
    new_tokens: number of tokens that a decoder generates per request.
    end_tokens: ids that end every text and occur nowhere else, for models that search for the end; a run determines
        them.
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
        for name, minimum in (("threads", 1), ("warmup", 0), ("rounds", 1), ("new_tokens", 1)):
            check_whole_number(name, getattr(self, name), minimum)
        if self.provider not in PROVIDERS:
            raise InputError(f"provider is {self.provider!r}: give one of {', '.join(PROVIDERS)}")
        for name in ("batch_sizes", "sequence_lengths", "thread_counts"):
            if not getattr(self, name) and name != "thread_counts":
                raise InputError(f"{name} is empty: give at least one")
            for value in getattr(self, name):
                check_whole_number(name, value, 1)
        if not (math.isfinite(self.min_seconds) and self.min_seconds >= 0):
            raise InputError(f"min_seconds is {self.min_seconds}: give 0 or more seconds")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise InputError(f"timeout_s is {self.timeout_s}: give more than 0 seconds")


def check_provider(name: str) -> None:
    """Check that the installed ONNX Runtime has a provider.

    Raises:
        InputError: the provider is not available.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if PROVIDERS[name] not in available:
        names = [short_name for short_name, provider in PROVIDERS.items() if provider in available]
        raise InputError(
            f"the installed ONNX Runtime {onnxruntime.__version__} has no {PROVIDERS[name]}; it has "
            f"{', '.join(names)}; install the package that has it, or use --provider cpu"
        )


def check_whole_number(name: str, value: object, minimum: int) -> None:
    """Raise an `InputError` unless the value is a whole number and not below the minimum."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputError(f"{name} is {value!r}: give a whole number, {minimum} or more")
