"""Settings of the C library's memory allocation."""

import ctypes
import sys

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
    if (library := _glibc()) is not None:
        for parameter, value in _SETTINGS.items():
            library.mallopt(parameter, value)


def return_freed_memory() -> None:
    """Return all memory of freed tensors to the system, when work of another kind begins."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library, or None if it is another one."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
