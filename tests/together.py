"""For tests of several processes: starts them, and gives images the same noise however shared out.
"""

from __future__ import annotations

import os
import socket
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_scenes import distributed

aten = torch.ops.aten
PROCESSES = 2


def start(work: Callable[[Path], Any], folder: Path) -> list[Any]:
    """What ``work(folder)`` returns in each of two processes that know each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run, args=(work, folder, rank, port)) for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.is_alive():
            process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors and all(p.exitcode == 0 for p in processes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def _run(work: Callable[[Path], Any], folder: Path, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }
    try:
        with distributed.session("cpu"):
            torch.save(work(folder), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise


@contextmanager
def same_noise(images: Tensor, seed: int) -> Iterator[None]:
    """Noise that follows from an image's number, the site drawn and the draw, and nothing else.

    :param images: (B,) numbers of the images in the whole batch. All noise has B rows.
    """
    noise = _Noise(images, seed)
    with _Sites(noise), noise:
        yield


class _Sites(Messenger):
    def __init__(self, noise: _Noise):
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, message: dict) -> None:
        self.noise.site, self.noise.draws = message["name"], 0


class _Noise(TorchDispatchMode):
    def __init__(self, images: Tensor, seed: int):
        super().__init__()
        self.images, self.seed = images, seed
        self.site, self.draws = "", 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded not in op.tags:
            return op(*args, **(kwargs or {}))
        if op == aten.rand.default:
            return self._uniform(torch.empty(args[0]))
        if op == aten.rand_like.default:
            return self._uniform(args[0])
        if op == aten.bernoulli.default:
            return (self._uniform(args[0]) < args[0]).to(args[0].dtype)
        if op == aten.multinomial.default and args[1] == 1:
            return (args[0] / -self._uniform(args[0]).log()).argmax(-1, keepdim=True)
        if op == aten.normal.Tensor_Tensor:
            return args[0] + args[1] * self._rows(args[0], torch.randn)
        if op == aten.normal_.default:
            return args[0].copy_(self._rows(args[0], torch.randn))
        if op == aten.uniform_.default:
            low, high = args[1:] or (0.0, 1.0)
            return args[0].copy_(low + (high - low) * self._uniform(args[0]))
        raise NotImplementedError(f"no noise like that of {op}")

    def _uniform(self, like: Tensor) -> Tensor:
        return self._rows(like, torch.rand)

    def _rows(self, like: Tensor, draw: Callable) -> Tensor:
        assert len(like) == len(self.images), f"{like.shape} is not of {len(self.images)} images"
        self.draws += 1
        key = zlib.crc32(f"{self.seed} {self.site} {self.draws}".encode())
        rows = []
        for image in self.images.tolist():
            generator = torch.Generator().manual_seed(distributed.seed(key, image))
            with torch._C._DisableTorchDispatch():
                rows.append(draw(like.shape[1:], generator=generator, dtype=like.dtype))
        return torch.stack(rows)
