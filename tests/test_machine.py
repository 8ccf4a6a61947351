"""What the process does with memory."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes
import resource
import torch
from pyro_scenes.machine import M_MMAP_THRESHOLD, keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        kept = [torch.zeros(1_500_000) for _ in range(3)]  # 6 MB each
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# As a process starts; glibc may raise it by itself later, whenever it likes.
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)
print(faults())
keep_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again() -> None:
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, run.stdout.split())
    assert given_back > 20 * 3 * 1000  # a fault for each page of 4 KiB, but for few
    assert kept < given_back / 100
