"""What a training step asks of a GPU: how many operations, and how often it waits for one.

Where images are few and networks small, a GPU is done with an operation before the processor has
launched the next one: a step then takes the number of its operations times what a launch takes.
Both numbers are the same on every device, so that they can be counted without a GPU.
"""

from __future__ import annotations

import pyro
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_scenes.bench.floors import TRAININGS, MiddleStep

aten = torch.ops.aten
# Operations whose results, or the sizes of them, the processor has to know before it goes on.
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.equal.default,
}


class Launches(TorchDispatchMode):
    """Counts operations that compute, backward ones too, and those that are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        mere_view = all(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.operations += not (mere_view and func._schema.returns)
        # An index of truths is made numbers first, as many as are true.
        chosen = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_)
        by_truth = chosen and any(
            value.dtype in (torch.bool, torch.uint8)
            for value in tree_leaves(args[1]) if isinstance(value, torch.Tensor)
        )
        self.waits += func in WAITING or by_truth
        return func(*args, **(kwargs or {}))


def count() -> dict[str, dict[str, int]]:
    """Of the middle step of a shipped training of each model."""
    found = {}
    for name in TRAININGS:
        step = MiddleStep(name, torch.device("cpu"))
        with pyro.validation_enabled(False):
            step()  # what is made once is there
            with Launches() as launches:
                step()
        found[name] = {
            "batch": step.run.config.train.batch_size, "operations": launches.operations,
            "waits": launches.waits,
        }
    return found
