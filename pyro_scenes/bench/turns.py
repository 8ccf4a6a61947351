"""Contestants that take turns: whatever else the machine does hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

# name -> what to call, and how much (images, say) a call does
Work = Mapping[str, tuple[Callable[[], object], int]]


def take_turns(work: Work, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call over its amount, by name and round; a first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    order = list(work)
    for counts in [False] + [True] * rounds:
        for name in order:
            call, amount = work[name]
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if counts:
                seconds[name].append((time.perf_counter() - start) / amount)
        order.reverse()
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """What is kept of a figure, ready for JSON."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
