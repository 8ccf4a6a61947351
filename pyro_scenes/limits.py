"""The memory that a file from a stranger may take: one bound, which every reader keeps.

A reader hands `check` what a file claims to hold before it takes memory for it, and refuses more
than `most` bytes. While it reads it takes at most PEAK times as much, copies and all.

| reader | counts |
|---|---|
| npz | all arrays, 8 bytes or more for each number that is no pixel |
| PNG | 4 bytes for each pixel of all files together, 8 if it has transparency |
| IDX | nothing: mnist.LIMIT is far below |
| checkpoint | its tensors, its pickle as the objects it may become, and the model it asks for |
| JSON | its text as the objects it may become |

And the largest seed.
"""

from __future__ import annotations

import math
import os

from pyro_scenes.errors import UserError

VARIABLE = "PYRO_SCENES_MEMORY"  # GiB, in place of the default
DEFAULT = 4.0
PEAK = 3
LAST_SEED = 2**64 - 1  # that torch takes
OBJECTS = 100  # bytes that a byte of JSON or of a pickle may take as Python objects, at most


def most() -> int:
    """Bytes that what is read of a file may take. :raises UserError: for a variable of no sense."""
    text = os.environ.get(VARIABLE) or str(DEFAULT)
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise UserError(f"{VARIABLE} is the GiB that a file may take, such as 8, not {text!r}")
    return int(size * 2**30)


def check(what: object, size: int) -> None:
    """:raises UserError: if ``what`` would take more than the bound with its ``size``, bytes."""
    if size > most():
        raise UserError(
            f"{what} claims {size / 2**30:.3g} GiB, more than {most() / 2**30:.3g}: if you trust"
            f" it and have the memory, set {VARIABLE} to the GiB that a file may take"
        )
