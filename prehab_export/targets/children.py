"""Children that do not outlive us."""

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def dies_with_us() -> Callable[[], None]:
    """What a child calls between fork and exec, so that the kernel ends it when the thread that started it is gone,
    killed without a word included (prctl(2)). Linux only; elsewhere it does nothing."""
    if sys.platform != "linux":
        return lambda: None
    library = ctypes.CDLL(None)  # loaded here: between fork and exec hardly anything is safe

    def prepare() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return prepare
