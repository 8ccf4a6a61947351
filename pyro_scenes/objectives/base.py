"""What objectives share: values that change with the step, and values set for a while."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def temporarily(module: object, **values) -> Iterator[None]:
    """Set attributes for a while."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def falling(step: int, start: float, end: float, begin: int, finish: int) -> float:
    """``start`` up to step ``begin``, ``end`` from ``finish`` on, geometric between."""
    return start * (end / start) ** linear(step, begin, finish)


def linear(step: int, begin: int, end: int) -> float:
    """0 up to step ``begin``, 1 from step ``end`` on, straight between."""
    if step >= end:
        return 1.0
    return (step - begin) / (end - begin) if step > begin else 0.0


def decayed(step: int, steps: int, ramp: int, decay_from: float, decay_to: float) -> float:
    """Factor of a learning rate: a rise over ``ramp`` steps, and a cosine from a part of all on."""
    part = linear(step, int(decay_from * steps), steps)
    factor = decay_to + (1 - decay_to) * 0.5 * (1 + math.cos(math.pi * part))
    return factor * (linear(step, -1, ramp) if ramp else 1.0)
