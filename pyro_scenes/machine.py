"""The machine at hand, and Pyro on it: its kind, its memory, random numbers and parameters."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyro
import torch
from torch import nn


def machine(device: torch.device) -> dict:
    """Processor, cores, threads, torch and accelerator, ready for JSON."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": (names + [platform.processor() or platform.machine()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def described(device: torch.device) -> str:
    """The same in a line."""
    return "{processor}, {threads} of {cores} cores, {device}, torch {torch}".format(
        **machine(device)
    )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed, inside; those of the processor and the device go on after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def own_parameters() -> Iterator[None]:
    """Pyro leaves parameters to their modules, inside: torch optimisers train them.

    Else it keeps them in its store by name, which two models may share. Pyro's optimisers take
    them from there, so that outside of what this package computes the setting is the user's.
    """
    with pyro.settings.context(module_local_params=True):
        yield


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or eval mode, inside; each of its modules is as it was after it."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# Of mallopt, and what they are set to, bytes: large blocks come from the heap, which is not
# given back, and which grows by much at a time. glibc allows no higher threshold.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 1 << 30, M_TOP_PAD: 64 << 20}


def keep_memory() -> None:
    """Have the process keep the memory of freed tensors; does nothing where libc is not glibc.

    By default tensors of more than a few hundred KiB go back to the system when they are freed,
    and each new one is paid for anew, a page fault every 4 KiB: thousands a training step, which
    cost more than the arithmetic done on them.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in KEPT.items():
        mallopt(option, value)


def at_a_time(number: int, height: int, width: int) -> int:
    """So many images at a time, or fewer of images larger than 64 x 64, which take more memory."""
    return max(1, min(number, number * 64**2 // (height * width)))
