"""Settings by name: what a run is made of, checked before anything is spent on it."""

from __future__ import annotations

import functools
import inspect
import math
import shlex
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pyro_scenes import extensions
from pyro_scenes.data import DATASETS
from pyro_scenes.errors import UserError, reason
from pyro_scenes.models import MODELS
from pyro_scenes.objectives import schedule


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop; defaults are those of LAVAE's fast preset."""

    steps: int = 3000  # of the optimiser
    batch_size: int = 64  # images a step, of all processes
    optimizer: str = "adam"  # adam or adamax
    beta2: float = 0.99  # decay of the optimiser's second moment
    clip: float = 100.0  # largest norm of the gradient, 0 for no limit
    precision: str = "auto"  # of LAVAE's inference and the VAE's networks, or float32, bfloat16
    checkpoint_every: int = 500  # steps
    log_every: int = 10  # steps
    eval_every: int = 250  # steps between short looks at held-out images
    eval_images: int = 500  # of that look


LAVAE_PAPER = TrainConfig(
    # Appendix B says over how many steps all that is annealed is, not how many there are.
    steps=100_000, optimizer="adamax", beta2=0.999, clip=0.0, precision="float32", eval_every=1000
)
AIR_PAPER = TrainConfig(
    steps=375_000, beta2=0.999, precision="float32", eval_every=1000,
    # 300 epochs (C.4) of 80,000 of the 90,000 images: how many train is not said.
)
# model name -> settings by preset; a model without an entry has the defaults
TRAINING = {
    "lavae": {"fast": TrainConfig(), "paper": LAVAE_PAPER},
    "discrete-air": {"fast": TrainConfig(steps=1500), "paper": AIR_PAPER},
    "air": {"fast": TrainConfig(steps=2000), "paper": AIR_PAPER},
    "conv-vae": {
        # Small batches: a minute of them learns more.
        "fast": TrainConfig(steps=20_000, batch_size=16, beta2=0.999, eval_every=1000),
        "paper": replace(LAVAE_PAPER, steps=200_000),  # half after the 100,000 of beta's rise
    },
}


# What would fail later, and less clearly, if it were smaller.
LEAST = {
    **dict.fromkeys(("steps", "batch_size", "checkpoint_every", "log_every", "eval_every"), 1),
    "location_every": 1,
    **dict.fromkeys(("eval_images", "max_objects", "latent", "appearance_width"), 1),
    **dict.fromkeys(("appearance_hidden", "sprite_hidden", "sprite_width"), 1),
    **dict.fromkeys(("sprite", "count_window", "blocked_window"), 1),
    "crop": 5,  # a strided convolution of a single pixel has no gradient in bfloat16
    **dict.fromkeys(("classes", "code", "decoder_hidden", "hidden", "glimpse_width"), 1),
    **dict.fromkeys(("window", "glimpse"), 8),
    **dict.fromkeys(("blur", "shut"), 0.1),
    **dict.fromkeys(("sigma", "scale_least", "angle_deviation", "attribute_least", "more"), 1e-3),
    "place_deviation": 1e-3,
    **dict.fromkeys(("grid_latent", "grid_stages"), 1),
    **dict.fromkeys(("location_width", "grid_width"), 2),
    **dict.fromkeys(("temperature", "temperature_end", "logit_scale"), 1e-6),
    **dict.fromkeys(("floor", "likelihood_floor"), 1e-7),
}
# What would take memory or time without end if it were larger, whoever asks for it.
MOST = {
    "grid_stages": 10, "location_blocks": 100, "max_objects": 1000, "more": 0.999, "looks": 100,
    "rounds": 100, "beta2": 0.999999,
    "location_every": 16,  # as calibration.END has it
    **dict.fromkeys(("floor", "likelihood_floor"), 0.49),  # of a half all pixels are alike
    # Parts of a training.
    **dict.fromkeys(("beta_full", "decay_from", "fit_from", "rest_from"), 1.0),
}
# What a setting may be called.
CHOICES = {
    "optimizer": ("adam", "adamax"), "precision": ("auto", "float32", "bfloat16"),
}
LARGEST = 2**16  # of any other whole number in a network's settings, and of an image's sides
LAYERS = 100  # numbers in one setting


@dataclass(frozen=True)
class RunConfig:
    """All that determines a run but for the machine: ``--set`` reaches each field of the parts."""

    model: str
    data: str
    preset: str
    seed: int
    train: TrainConfig
    schedule: Any  # the objective's dataclass
    net: Any  # the model's dataclass
    start: str = ""  # the checkpoint whose weights it begins with, "" for random ones
    parts: typing.ClassVar[tuple[str, ...]] = ("train", "schedule", "net")

    def to_dict(self) -> dict:
        """As JSON has it, but for tuples."""
        return {name: value for name, value in asdict(self).items() if name != "start" or value}

    def command(self, seed: int | str) -> str:
        """What trains such a run, with every setting that is not the preset's.

        Of networks that another run had all: by default they have that one's.
        """
        usual = make_config(self.model, self.data, self.preset, known=False)
        words = ["bin/svi-train", "--model", self.model, "--data", self.data]
        words += ["--preset", self.preset]
        for part in RunConfig.parts:
            theirs = self.start and part == "net"
            for name, value in vars(getattr(self, part)).items():
                if theirs or value != getattr(getattr(usual, part), name):
                    words += ["--set", f"{spelled(self, part, name)}={written(value)}"]
        words += ["--from", self.start] if self.start else []
        return shlex.join([*words, "--seed", str(seed)])

    @staticmethod
    def from_dict(values: dict) -> RunConfig:
        """The inverse of ``to_dict``, through JSON or not.

        :raises UserError: if it names what this version does not know, or for values of the wrong
            type or size.
        """
        try:
            config = make_config(
                values["model"], values["data"], values["preset"], seed=values["seed"], known=False
            )
            config = replace(config, start=values.get("start", ""))
            if not (_suits(config.data, str) and _suits(config.seed, int)):
                raise TypeError("data is a name, and seed a whole number")
            if not _suits(config.start, str):
                raise TypeError("start is a name")
            for part in RunConfig.parts:
                now = getattr(config, part)
                kinds = _kinds(now.__class__)
                # Lists are what JSON leaves of tuples.
                given = {k: tuple(v) if isinstance(v, list) else v for k, v in values[part].items()}
                for name, value in given.items():
                    if not _suits(value, kinds[name]):
                        raise TypeError(f"{name} is {value!r:.60}")
                # What an older version did not know is at its default, not as the preset has it.
                config = replace(config, **{part: now.__class__(**given)})
        except (KeyError, TypeError, AttributeError) as error:
            said = reason(error)
            raise UserError(f"the configuration is not of this version ({said})") from error
        _check_sizes(config)
        return config


def make_config(
    model: str,
    data: str,
    preset: str = "fast",
    settings: Sequence[str] = (),
    steps: int | None = None,
    seed: int = 0,
    known: bool = True,
    start: str = "",
    net: Any = None,
) -> RunConfig:
    """A run's configuration.

    :param data: a registered data set or the path of an npz file or of a folder of PNG files.
    :param settings: "name=value", any field of the three parts; a name that two of them have needs
        its part, as in "net.more=0.4".
    :param known: insist that ``data`` exists.
    :param start: the checkpoint whose weights the run begins with.
    :param net: the networks' settings to begin with, in place of the preset's.
    :raises UserError: on unknown names and values of the wrong type or size.
    """
    if model not in MODELS:
        raise UserError(
            f"no model is called {model!r:.60}; there are {', '.join(MODELS)}, and those of the"
            f" files that {extensions.VARIABLE} names"
        )
    _, presets, suited = MODELS[model]
    if preset not in presets:
        raise UserError(f"{model} has no preset {preset!r:.60}; it has {', '.join(presets)}")
    if known and data not in DATASETS and not Path(data).exists():
        raise UserError(
            f"no data set and no file is called {data!r}; the data sets are {', '.join(DATASETS)}"
        )
    train = TRAINING.get(model, {}).get(preset, TrainConfig())
    config = RunConfig(
        model, data, preset, seed, train, schedule(model, preset), presets[preset], start
    )
    for name, value in suited.get(preset, {}).get(data, {}).items():
        config = _with(config, *find(config, name), value)
    if net is not None:
        config = replace(config, net=net)
    if steps is not None:
        settings = [*settings, f"steps={steps}"]
    for setting in settings:
        config = _set(config, setting)
    _check_sizes(config)
    return config


def _check_sizes(config: RunConfig) -> None:
    """:raises UserError: for settings that are too small or too large, or none of a few names."""
    for part in RunConfig.parts:
        now = getattr(config, part)
        kinds = _kinds(now.__class__)
        own = now.__class__.__module__.split(".")[0] == __name__.split(".")[0]
        for name, value in vars(now).items():
            if not _suits(value, kinds[name]):
                raise UserError(
                    f"{name} is {value!r:.60}: a setting is a bool, an int or float that is not"
                    " negative, a str, or a tuple of one of these, as its class says"
                )
            # What another's class calls by the same name may be another thing.
            if own and value not in CHOICES.get(name, (value,)):
                raise UserError(f"{name} must be one of {', '.join(CHOICES[name])}")
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(value, str) or not numbers:
                continue
            least, most = (LEAST.get(name, 0), MOST.get(name, math.inf)) if own else (0, math.inf)
            if part == "net" and all(type(number) is int for number in numbers):
                most = min(most, LARGEST)
            if min(numbers) < least:
                raise UserError(f"{name} must be at least {least:g}, not {value!s:.60}")
            if max(numbers) > most:
                raise UserError(f"{name} must be at most {most:g}, not {value!s:.60}")
            if len(numbers) > LAYERS:
                raise UserError(f"{name} must be {LAYERS} numbers at most, not {len(numbers)}")


@functools.cache
def _kinds(part: type) -> dict[str, Any]:
    """The types of a part's settings."""
    return typing.get_type_hints(part)


def _suits(value: Any, kind: Any) -> bool:
    """Whether a value is of the type of a setting; numbers are finite and not negative."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_suits(item, inner) for item in value)
    if kind in (int, float):
        known = type(value) is int or (kind is float and type(value) is float)
        return known and 0 <= value <= sys.float_info.max
    return type(value) is kind


def _set(config: RunConfig, setting: str) -> RunConfig:
    name, equals, text = setting.partition("=")
    if not equals:
        raise UserError(f"a setting is name=value, not {setting!r}")
    part, name = find(config, name)
    kind = _kinds(getattr(config, part).__class__)[name]
    return _with(config, part, name, _parse(name, text, kind))


def find(config: RunConfig, name: str) -> tuple[str, str]:
    """The part and the name of a setting, given as "name" or "part.name".

    :raises UserError: if there is none, or one in several parts.
    """
    given, dot, bare = name.rpartition(".")
    parts = [part for part in _having(config, bare) if given in ("", part)]
    if not parts or dot and not given:
        names = [name for names in settings(config).values() for name in names]
        raise UserError(f"no setting is called {name!r}; there are {', '.join(names)}")
    if len(parts) > 1:
        asked = " or ".join(f"{part}.{bare}" for part in parts)
        raise UserError(f"{bare} is a setting of {' and '.join(parts)}: write {asked}")
    return parts[0], bare


def spelled(config: RunConfig, part: str, name: str) -> str:
    """How a setting is called: with its part where another has one of the same name."""
    return f"{part}.{name}" if len(_having(config, name)) > 1 else name


def written(value: Any) -> str:
    """A value as ``--set`` takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _having(config: RunConfig, name: str) -> list[str]:
    """The parts that have a setting of that name."""
    return [part for part in RunConfig.parts if name in _kinds(getattr(config, part).__class__)]


def _with(config: RunConfig, part: str, name: str, value: Any) -> RunConfig:
    """The configuration with one field of a part changed."""
    return replace(config, **{part: replace(getattr(config, part), **{name: value})})


def settings(config: RunConfig) -> dict[str, dict[str, tuple[Any, str]]]:
    """What ``--set`` reaches: part -> name -> value and what its source says of it."""
    return {
        part: {
            spelled(config, part, name): (value, _comments(getattr(config, part).__class__)[name])
            for name, value in vars(getattr(config, part)).items()
        }
        for part in RunConfig.parts
    }


@functools.cache
def _comments(part: type) -> dict[str, str]:
    """The comments above and beside each field of a dataclass, "" for none."""
    said: dict[str, str] = {}
    above: list[str] = []
    try:
        source = inspect.getsource(part)
    except (OSError, TypeError):  # written in a notebook or a shell
        source = ""
    for line in source.splitlines():
        code, _, comment = line.partition("# ")
        if code.strip():
            said[code.partition(":")[0].strip()] = " ".join([*above, comment]).strip()
            comment, above = "", []
        above += [comment] if comment else []
    return {field.name: said.get(field.name, "") for field in fields(part)}


def _parse(name: str, text: str, kind: Any) -> Any:
    """Text to a value of the field's type."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float):
            value = kind(text)
        elif typing.get_origin(kind) is tuple:
            return tuple(_parse(name, item, typing.get_args(kind)[0]) for item in text.split(","))
        else:
            return text
    except (ValueError, KeyError):
        wanted = kind if isinstance(kind, types.GenericAlias) else kind.__name__
        raise UserError(f"{name} takes a value of type {wanted}, not {text!r}") from None
    if not value >= 0 or value == float("inf"):
        raise UserError(f"{name} must be finite and not negative, not {text}")
    return value
