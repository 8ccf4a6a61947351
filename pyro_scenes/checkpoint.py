"""Checkpoints: one file with the configuration, the weights and, in a run, the training's state.

A file is a ``torch.save`` of plain tensors, numbers, strings and containers, written whole or not
at all. A stranger's file cannot run code, and what it claims is checked before memory is taken for
it: see tensors.py for the file, and ``build`` for the model that its settings ask for.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_scenes import limits, tensors
from pyro_scenes.config import LARGEST, RunConfig
from pyro_scenes.errors import UserError, reason
from pyro_scenes.files import atomic_write, parse_json
from pyro_scenes.machine import keep_memory
from pyro_scenes.models import MODELS, GenerativeModel

FORMAT = "pyro_scenes checkpoint 1"
FILE = "checkpoint.pt"
CONFIG, HISTORY, PICTURE = "config.json", "history.json", "inference.png"  # beside it in a run
SHIPPED = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and where it comes from; ``training`` is what a run goes on from."""

    model: GenerativeModel
    config: RunConfig
    step: int
    path: Path
    training: dict | None

    @property
    def images(self) -> str | None:
        """The digest of the file's images that it was trained on; None where none is known."""
        return (self.training or {}).get("images")

    @property
    def name(self) -> str:
        """What it is called: its run's folder, or the file."""
        return self.path.resolve().parent.name if self.path.name == FILE else self.path.stem


# What a checkpoint holds, by the types of the values.
CONTENT = {"format": str, "config": str, "image_shape": list, "step": int, "model": dict}
TRAINING = {
    "optimizer": dict, "modules": dict, "random": Tensor, "random_cuda": list,
    "seconds": (int, float), "machine": str, "history": dict,
}
LONGEST = 2**53  # of steps and seconds: what a float has exactly
# What makes tensors of a size.
MAKERS = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye,
    torch.arange, torch.linspace,
}


def build(config: RunConfig, image_shape: tuple[int, int, int]) -> GenerativeModel:
    """A new model.

    :param image_shape: (C, H, W).
    :raises UserError: if it does not suit, or takes more memory than a file may ask for.
    """
    with _Metered():
        return MODELS[config.model][0](config.net, image_shape)


class _Metered(TorchFunctionMode):
    """Refuses to make more tensors than a file may ask for, before the one too many is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in MAKERS:
            try:
                size = function(*args, **{**kwargs, "device": "meta"}).nbytes
            except RuntimeError:  # more bytes than can be counted
                size = 2**63
            self.made += size
            limits.check("the model of these settings", self.made)
        return function(*args, **kwargs)


def save(
    path: Path,
    config: RunConfig,
    model: GenerativeModel,
    step: int,
    training: dict | None = None,
    half: bool = False,
) -> None:
    """:param half: in half the size, see ``rounded``."""
    content = {
        "format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "image_shape": list(model.image_shape),
        "step": step,
        "model": _halved(model) if half else model.state_dict(),
        "training": training,
    }
    # Into memory first: torch does not say well what becomes of a write that fails.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


@torch.no_grad()
def rounded(model: GenerativeModel) -> GenerativeModel:
    """The model, its weights rounded in place to what 16 bits hold, of float16 where they can."""
    model.load_state_dict(_halved(model))
    return model


def _halved(model: GenerativeModel) -> dict[str, Tensor]:
    state = model.state_dict()
    halves = {
        name: value.half() if value.dtype == torch.float32 else value
        for name, value in state.items()
    }
    return {
        name: value if value.isfinite().all() else state[name] for name, value in halves.items()
    }


def load(name: str | Path, device: str = "cpu") -> Checkpoint:
    """A checkpoint: a run's folder, a file, or the name of a shipped one.

    :param device: cpu, cuda, or auto.
    :raises UserError: if there is none or it is not one of ours.
    """
    path = find(name)
    content = read(path)
    target = resolve(device)
    config = configuration(content)
    try:
        model = build(config, tuple(content["image_shape"]))
    except (ArithmeticError, RuntimeError, ValueError) as error:  # of settings that make no sense
        raise _foreign(path) from error
    state = {
        name: value.float() if getattr(value, "dtype", None) == torch.float16 else value
        for name, value in content["model"].items()
    }
    if _kinds(state) != _kinds(model.state_dict()):
        raise _foreign(path)
    if not all(value.isfinite().all() for value in state.values()):
        raise UserError(f"{path} has weights that are not finite: its training went wrong")
    model.load_state_dict(state)
    return Checkpoint(
        model.to(target).eval(), config, content["step"], path, content["training"]
    )


def find(name: str | Path) -> Path:
    """The file that a name stands for. :raises UserError: if there is none."""
    path = Path(name)
    if path.is_dir():
        path = path / FILE
    if path.is_file():
        return path
    if str(name) in shipped():
        return shipped()[str(name)]
    raise UserError(
        f"no run, file or shipped checkpoint is called {str(name)!r}; svi-eval --list shows those"
    )


def read(path: Path) -> dict:
    """The content of a file. :raises UserError: if it is not one of ours, or damaged."""
    try:
        content = tensors.read(path)
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever a foreign file makes of the reader
        raise _foreign(path) from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), str):
        raise _foreign(path)
    if content["format"] != FORMAT:
        raise UserError(f"{path} is of another format: {content['format']!r:.80}, not {FORMAT!r}")
    training = content.get("training", False)
    if not (_holds(content, CONTENT) and (training is None or _is_training(training))):
        raise _foreign(path)
    sizes, step = content["image_shape"], content["step"]
    if not (type(step) is int and 0 <= step < LONGEST and len(sizes) == 3
            and all(type(n) is int and 0 < n <= LARGEST for n in sizes)):
        raise _foreign(path)
    return content


def configuration(content: dict) -> RunConfig:
    """The configuration in the content of a checkpoint. :raises UserError: if there is none."""
    try:
        values = parse_json(content["config"])
    except ValueError as error:
        raise UserError(f"the checkpoint's settings cannot be read ({reason(error)})") from error
    return RunConfig.from_dict(values)


def networks(name: str | Path, model: str) -> Any:
    """The networks' settings of a checkpoint, for a run that begins with its weights.

    :raises UserError: if there is none of that model.
    """
    config = configuration(read(find(name)))
    if config.model != model:
        raise UserError(f"{name} is of {config.model}, not of {model}: begin with one of {model}")
    return config.net


def _holds(content: object, kinds: dict) -> bool:
    return isinstance(content, dict) and all(
        isinstance(content.get(name), kind) for name, kind in kinds.items())


def _is_training(content: object) -> bool:
    """Whether there is what a run goes on from, with a history of numbers."""
    if not _holds(content, TRAINING) or not 0 <= content["seconds"] < LONGEST:  # type: ignore
        return False
    # Older ones do not say on which file's images they were trained.
    return isinstance(content.get("images"), str | None) and all(  # type: ignore[attr-defined]
        type(name) is str and isinstance(series, list | tuple) and len(series) == 2
        and all(type(part) is list and len(part) == len(series[0]) for part in series)
        and all(type(step) is int and 0 <= step < LONGEST for step in series[0])
        and all(type(value) is float for value in series[1])
        for name, series in content["history"].items()  # type: ignore[index]
    )


def _kinds(state: dict[str, Any]) -> dict[str, Any]:
    """What two states must have in common to take each other's place; None for no tensor."""
    return {
        name: (value.shape, value.dtype) if isinstance(value, Tensor) else None
        for name, value in state.items()
    }


def digest(path: Path) -> str:
    """What tells a file from others: the beginning of its SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def shipped() -> dict[str, Path]:
    """The checkpoints inside the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.pt"))}


def resolve(device: str) -> torch.device:
    """The device of that name, and the process made ready to compute (`machine.keep_memory`).

    :raises UserError: if cuda is asked for and there is none.
    """
    keep_memory()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: use --device cpu")
    return torch.device(device)


def _foreign(path: Path) -> UserError:
    return UserError(f"{path} is not a checkpoint of pyro_scenes, or it is damaged")
