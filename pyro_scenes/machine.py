"""The kind of machine that a figure was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


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
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def described(device: torch.device) -> str:
    """The same in a line."""
    return "{processor}, {threads} of {cores} cores, {device}, torch {torch}".format(
        **machine(device)
    )
