"""Settings of the C library's memory allocation."""

import ctypes
from contextlib import suppress

# Parameters of mallopt (glibc, malloc.h), and their values in bytes.
_SETTINGS = {
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: unused memory at the end of the heap up to which it stays
    -2: 2**26,  # M_TOP_PAD: what the heap grows by beyond what is needed
    -3: 2**30,  # M_MMAP_THRESHOLD: size from which a block is mapped on its own, and unmapped when freed
}


def keep_freed_memory() -> None:
    """Let this process reuse the memory of freed tensors, instead of returning it to the system at once.

    By default, glibc returns every tensor of some megabytes when it is freed. The next one of the same size is then
    made of new pages, which the system clears one by one; calibration spends a tenth of its time on that. Other C
    libraries have no such setting.
    """
    with suppress(AttributeError, OSError, TypeError):
        for parameter, value in _SETTINGS.items():
            ctypes.CDLL(None).mallopt(parameter, value)
