"""Checkpoints: one file with the configuration, the weights and, in a run, the training's state.

A file is a ``torch.save`` of plain tensors, numbers, strings and containers, written whole or not
at all, and read with ``weights_only=True``: a stranger's file cannot run code.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from pyro_scenes.config import RunConfig
from pyro_scenes.data.files import atomic_write
from pyro_scenes.errors import UserError
from pyro_scenes.machine import keep_memory
from pyro_scenes.models import MODELS, GenerativeModel

FORMAT = "pyro_scenes checkpoint 1"
FILE = "checkpoint.pt"
SHIPPED = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and where it comes from; ``training`` is what a run goes on from."""

    model: GenerativeModel
    config: RunConfig
    step: int
    path: Path
    training: dict | None


def build(config: RunConfig, image_shape: tuple[int, int, int]) -> GenerativeModel:
    """A new model. :param image_shape: (C, H, W). :raises UserError: if it does not suit."""
    return MODELS[config.model][0](config.net, image_shape)


def save(
    path: Path,
    config: RunConfig,
    model: GenerativeModel,
    step: int,
    training: dict | None = None,
) -> None:
    content = {
        "format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "image_shape": list(model.image_shape),
        "step": step,
        "model": model.state_dict(),
        "training": training,
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def load(name: str | Path, device: str = "cpu") -> Checkpoint:
    """A checkpoint: a run's folder, a file, or the name of a shipped one.

    :param device: cpu, cuda, or auto.
    :raises UserError: if there is none or it is not one of ours.
    """
    path = find(name)
    content = read(path)
    target = resolve(device)
    config = RunConfig.from_dict(json.loads(content["config"]))
    model = build(config, tuple(content["image_shape"]))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise _foreign(path) from error
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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever a foreign file makes of the reader
        raise _foreign(path) from error
    wanted = {"format", "config", "image_shape", "step", "model", "training"}
    if not isinstance(content, dict) or not wanted <= content.keys():
        raise _foreign(path)
    if content["format"] != FORMAT:
        raise UserError(f"{path} is of another format: {content['format']!r}, not {FORMAT!r}")
    return content


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
