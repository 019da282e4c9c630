"""The memory of freed tensors is used again instead of being returned to the system."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from prehab_export.system.heap import keep_freed_memory, return_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new_pages()
if sys.argv[1] == "kept and returned":
    keep_freed_memory()
    new_pages()
    many = [torch.ones(48 << 20, dtype=torch.uint8) for _ in range(5)]
    kept = torch.ones(1 << 20, dtype=torch.uint8)
    del many
    before = resident()
    return_freed_memory()
    print((before - resident()) / (48 << 20))
    sys.exit()
print(new_pages() * resource.getpagesize() / (48 << 20))
"""


GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")


def tensors(setting: str) -> float:
    """Return how many tensors' memory was new in 20 that were freed, or was returned to the system of 5."""
    command = [sys.executable, "-c", SCRIPT, setting]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@GLIBC
def test_freed_memory_is_used_again():
    assert tensors("default") > 10
    assert tensors("kept") < 1


@GLIBC
def test_freed_memory_is_returned_when_asked_for():
    assert tensors("kept and returned") > 4
