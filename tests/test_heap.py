"""The memory of freed tensors is used again instead of being returned to the system."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from prehab_export.system.heap import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new_pages()
print(new_pages() * resource.getpagesize() / (48 << 20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_is_used_again():
    def tensors_of_new_pages(setting: str) -> float:
        command = [sys.executable, "-c", SCRIPT, setting]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert tensors_of_new_pages("default") > 10
    assert tensors_of_new_pages("kept") < 1
