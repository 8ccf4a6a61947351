"""How near a training step comes to the arithmetic of its networks.

A step's floor is the time that its products of matrices and its convolutions would take at the
rate of one large product of matrices of the same precision, on the same machine in the same minute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pyro_scenes import checkpoint
from pyro_scenes.bench.turns import spread, take_turns
from pyro_scenes.data import make
from pyro_scenes.data.npz import save_npz
from pyro_scenes.training import Run

# A shipped training of each model, whose middle step is taken again: at the end some parts rest.
TRAININGS = (
    "lavae-multi-dsprites", "discrete-air-multi-sprites", "air-multi-sprites",
    "conv-vae-multi-dsprites",
)
IMAGES = 200
SIDE = 1024  # of the matrices whose product sets the rate


class Operations(TorchDispatchMode):
    """Counts the operations of products and convolutions by precision, backward ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            dtype = next(value.dtype for value in args if isinstance(value, torch.Tensor))
            self.counted[dtype] += formula(*args, **(kwargs or {}), out_val=out)
        return out


class MiddleStep:
    """The step in the middle of a shipped training, as often as wanted."""

    def __init__(self, name: str, device: torch.device):
        shipped = checkpoint.load(name)
        self.middle = shipped.config.train.steps // 2
        scenes = make(shipped.config.data, IMAGES, segmentation=False)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "scenes.npz"
            save_npz(path, scenes)
            self.run = Run(replace(shipped.config, data=str(path)), device.type)
        self.run.model.load_state_dict(shipped.model.state_dict())

    def __call__(self) -> None:
        self.run.step = self.middle
        self.run.advance()

    def operations(self) -> Mapping[torch.dtype, int]:
        with Operations() as operations:
            self()
        return operations.counted


def compare(rounds: int, device: torch.device) -> dict:
    """For each model: operations of a step, its seconds, and the floor's part of them."""
    names = [name for name in TRAININGS if name in checkpoint.shipped()]
    steps = {name: MiddleStep(name, device) for name in names}
    operations = {name: step.operations() for name, step in steps.items()}
    matrices = {
        dtype: torch.randn(SIDE, SIDE, device=device).to(dtype)
        for dtype in sorted(set().union(*operations.values()), key=str)
    }
    work: dict[str, tuple[Callable[[], object], int]] = {n: (s, 1) for n, s in steps.items()}
    for dtype, matrix in matrices.items():
        work[str(dtype)] = partial(torch.mm, matrix, matrix), 2 * SIDE**3
    seconds = take_turns(work, rounds, device)
    return {
        "rate": {str(dtype): spread([1 / s for s in seconds[str(dtype)]]) for dtype in matrices},
        "steps": {
            name: {
                "operations": {str(dtype): count for dtype, count in operations[name].items()},
                "batch": step.run.config.train.batch_size,
                "seconds": spread(seconds[name]),
                "floor": spread([
                    sum(n * seconds[str(d)][i] for d, n in operations[name].items()) / taken
                    for i, taken in enumerate(seconds[name])
                ]),
            }
            for name, step in steps.items()
        },
    }
