"""A device that is not the CPU, where there is no GPU.

Its operations and random numbers are the CPU's, so that whatever is computed is the same on either.
As on a GPU, operations do not take tensors of both, but for some that a GPU refuses and this does
not: generators of the CPU, single numbers in place. A process that imports this has it to its end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils._device
from click.testing import CliRunner
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from test_distributed import TINY
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

from pyro_scenes import bounds, checkpoint, evaluate, graph, report, training
from pyro_scenes.cli.calibrating import calibrate
from pyro_scenes.cli.inferring import infer
from pyro_scenes.cli.measuring import evaluate as evaluating
from pyro_scenes.cli.reporting import report as reporting
from pyro_scenes.config import make_config
from pyro_scenes.data import load_npz
from pyro_scenes.models.base import SceneModel
from pyro_scenes.priors import UniformCount

aten = torch.ops.aten
NAME = "elsewhere"


class Module:
    """What torch asks the module of a device."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
DEVICE = torch.device(NAME, 0)
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
# Operations that take numbers of the CPU in tensors without dimensions; so do those by elements.
OF_NUMBERS = {
    aten.fill.Tensor, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor,
    aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
}
INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Elsewhere(Tensor):
    """A tensor of the device; what it holds is on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE,
        )

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held})"

    def __reduce_ex__(self, protocol: Any) -> Any:  # as files are read: onto the CPU
        return self.held.detach().__reduce_ex__(protocol)

    def as_subclass(self, cls: type) -> Any:
        """A shell without values: Pyro's provenance keeps the tensor itself beside it."""
        return torch.empty(self.shape, dtype=self.dtype).as_subclass(cls)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _call(function, *args, **(kwargs or {}))


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """:raises RuntimeError: for tensors of both devices, where a GPU does."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, Elsewhere) for x in tensors)
    numbers = torch.Tag.pointwise in function.tags or function in OF_NUMBERS
    of_cpu = [x for x in tensors if not isinstance(x, Elsewhere) and (x.dim() or not numbers)]
    if function in INDEXING and isinstance(args[0], Elsewhere):  # indices may be on the CPU
        of_cpu = [x for x in of_cpu if any(x is arg for arg in args)]
    if of_cpu and there and function not in COPIES:
        raise RuntimeError(f"{function} of tensors on two devices")
    device = kwargs.get("device")
    if device is not None:
        there, kwargs["device"] = torch.device(device).type == NAME, torch.device("cpu")
    if function is aten._conj.default:  # a flag, which is not heeded here
        function = aten.conj_physical.default
    held_args, held_kwargs = tree_map_only(Elsewhere, lambda x: x.held, (args, kwargs))
    result = function(*held_args, **held_kwargs)
    for argument, value in zip(function._schema.arguments, args, strict=False):
        if argument.is_write and isinstance(result, Tensor):
            return value  # in place: it is what was given
    return tree_map_only(Tensor, Elsewhere, result) if there else result


library = torch.library.Library("_", "IMPL")
library.fallback(_call, "PrivateUse1")
library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _lstm_cell(
    x: Tensor, state: tuple[Tensor, Tensor], w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor
) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = (F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class Within(TorchFunctionMode):
    """What torch computes past the dispatcher, or by kernels that GPUs alone have."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            kwargs = {"dtype": args[0].dtype, "device": DEVICE} | kwargs
            function, args = torch.tensor, args[1:]
        device = kwargs.get("device")
        makes = function in torch.utils._device._device_constructors()
        if makes and device is not None and torch.device(device).type == NAME:
            return function(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if function is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].held.tolist()
        if function is torch.lstm_cell:
            return _lstm_cell(*args, **kwargs)
        return function(*args, **kwargs)


# --- what the tests read --------------------------------------------------------------------

# Schedules short enough for all their events.
EVENTS = {
    "lavae": ("appearance_prior=mixture:3", "rest_from=0.4", "fit_from=0.9", "dreams=2",
              "appearance_anew=True"),
    "discrete-air": ("twin=2", "attributes_from=3", "combine=deform"),
    "air": ("contrast=True",),
    "conv-vae": (),
}
STEPS = 8
DEVICES: dict[str, list[str]] = {}  # of the model and of images, as figures were taken


def refused() -> dict[str, bool]:
    """Whether the device refuses what a GPU does, and takes what a GPU takes."""
    here, there = torch.ones(3), torch.ones(3, device=DEVICE)
    index = torch.zeros(1, dtype=torch.long)

    def raises(call: Callable[[], Any]) -> bool:
        try:
            call()
        except (RuntimeError, TypeError):
            return True
        return False

    return {
        "sum": raises(lambda: here + there), "product": raises(lambda: there.outer(here)),
        "layer": raises(lambda: torch.nn.Linear(3, 2)(there)),
        "where": raises(lambda: torch.where(here > 0, there, there)),
        "gather": raises(lambda: there.gather(0, index)), "numpy": raises(there.numpy),
        "number in a stack": raises(lambda: torch.stack([there[0], here[0]])),
        "CPU's by index": raises(lambda: here[index.to(DEVICE)]),
        "not: index of the CPU": raises(lambda: there[index]),
        "not: number": raises(lambda: there * here[0]), "not: copy": raises(there.cpu),
    }


def save_scenes(path: Path) -> None:
    """24 images of 16 x 16 pixels with up to two L's: without a symmetry, no two angles fit alike.
    """
    images, counts = np.zeros((24, 16, 16, 1), np.uint8), np.arange(24) % 3
    for image, count, left in zip(images, counts, 2 + np.arange(24) // 3, strict=True):
        for top in range(1, 7 * count, 7):
            image[top : top + 6, left : left + 3] = 255
            image[top + 4 : top + 6, left : left + 5] = 255
    np.savez(path, images=images, counts=counts)


def _interrupt(run: training.Run, figures: dict) -> None:
    if run.step == STEPS // 2 + 1:  # one after what it goes on from
        raise KeyboardInterrupt


def figures(model: str, device: torch.device, data: Path) -> dict[str, Any]:
    """Of a training and what follows it, on a device."""
    setattr(checkpoint, "resolve", lambda name: device)
    out = data.parent / device.type
    settings = (*TINY[model], *EVENTS[model], "batch_size=8", "eval_images=2", "precision=float32",
                "log_every=1", "eval_every=2", "checkpoint_every=2")
    config = make_config(model, str(data), "fast", settings, STEPS)
    with suppress(KeyboardInterrupt):
        training.train(config, out, progress=False, on_record=_interrupt)
    history = training.train(config, out, resume=True, progress=False)
    found: dict[str, Any] = {name: values for name, (_, values) in history.items()}
    trained = checkpoint.load(out).model
    scenes = load_npz(data)
    found |= evaluate.evaluate(trained, scenes, particles=12, nll_images=4)
    x = scenes.batch(slice(0, 6)).to(device)
    torch.manual_seed(0)
    drawn = trained.draw(4)
    found["draw"] = [part.tolist() for part in drawn if part is not None]
    if isinstance(trained, SceneModel):
        scene = trained.infer(x)
        found["render"] = trained.render(scene).tolist()
        composed = trained.compose(scene.to_json())
        found["composed"] = trained.render(composed).tolist(), composed.boxes.tolist()
        found["nodes"] = graph.tensors(scene).nodes.tolist()
        with trained.priors(count=UniformCount(0, 1)):
            found["swapped"] = bounds.iwae(trained, x, 3).tolist()
    loss = SVI(trained.model, trained.guide, Adam({"lr": 1e-4}), Trace_ELBO())
    found["svi"] = [loss.step(x) for _ in range(2)]
    del found["seconds"]
    DEVICES["here" if device.type == "cpu" else "there"] = [str(trained.device), str(x.device)]
    return found


def commands(model: str, scenes: Path) -> dict[str, str]:
    """What commands say of a run on the device, or "" where all is well."""
    folder, data, said = scenes.parent, str(scenes), {}
    run = str(folder / NAME)
    report.IMAGES, report.PARTICLES = 4, 3
    lines = {
        "eval": (evaluating, [run, "--data", data, "--particles", "3", "--figures",
                              str(folder / "pictures"), "--curve", str(folder / "curve.png")]),
        "report": (reporting, [run, "--out", str(folder / "page.html"), "--images", "4"]),
        "sample": (infer, [run, "--sample", "3", "--figure", str(folder / "sample.png")]),
    }
    if model != "conv-vae":
        drawn = ["figure", "traverse", "swap", "steps", "tables"]
        drawn += ["templates"] * (model == "discrete-air")
        lines["infer"] = infer, [run, data, "--out", str(folder / "inferred.json"), *(
            word for name in drawn for word in (f"--{name}", str(folder / f"{name}.png")))]
        lines["calibrate"] = calibrate, [run, "--scenes", "4", "--draws", "3"]
        for prior in ("count=fit", "count=uniform:0-1", "appearance=mixture:2"):
            lines[prior] = evaluating, [run, "--data", data, "--particles", "2", "--prior", prior]
    for name, (command, words) in lines.items():
        result = CliRunner().invoke(command, words)
        said[name] = "" if result.exit_code == 0 else f"{result.output} {result.exception!r}"
    return said


def main(model: str, folder: Path) -> None:
    save_scenes(scenes := folder / "scenes.npz")
    with Within():
        found = {
            "refused": refused(), "here": figures(model, torch.device("cpu"), scenes),
            "there": figures(model, DEVICE, scenes), "commands": commands(model, scenes),
            "devices": DEVICES,
        }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
