"""What every model offers; training, evaluation and the commands know no more than this."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_scenes.errors import UserError
from pyro_scenes.machine import own_parameters
from pyro_scenes.scene import Scene

# What suits the data sets of grey images.
GREY = dict.fromkeys(
    ("multi-mnist", "multi-sprites", "multi-sprites-small"), {"likelihood": "normal"}
)
INK = 0.3  # of 1, the least that counts as a grey object's in its box
ROUNDED = 1e-3  # so far beyond 0 and 1 a value may be that was rounded
NUMBERS = itertools.count()  # of models, for their names


class GenerativeModel(PyroModule):
    """A generative model of images with its amortised guide.

    A subclass has ``model(x)`` and ``guide(x)``, both ``pyro_method``: one plate "images" of
    ``len(x)`` at dim -1, the same latent sites, each with a ``log_prob`` of shape (B,), and the
    image observed as "x". Its networks accept a particle plate to the left, so that ``x`` of
    shape (B, C, H, W) is encoded once however many particles are drawn.

    :ivar image_shape: (C, H, W) of the images that it was made for.
    :ivar likelihood: p(x given its mean), with ``name`` and ``binary``, see likelihoods.py.
    :ivar autocast: whether its networks may use bfloat16; a training sets it.
    :ivar decoders: names of its parts that make p(x given z); priors are called ``NAME_prior``.
    :ivar rates: names of the learning rates that its objective sets, see ``group``.
    """

    image_shape: tuple[int, int, int]
    likelihood: nn.Module
    autocast: bool = False
    decoders: tuple[str, ...] = ("decoder",)
    rates: tuple[str, ...] = ("all",)

    def __init__(self, name: str = "") -> None:
        """:param name: of its parameters in Pyro's store; by default one that no other model has.
        """
        super().__init__(name or _name(type(self)))
        _ready(self._pyro_context)

    def __deepcopy__(self, memo: dict[int, Any]) -> GenerativeModel:
        """A copy with a name of its own: in Pyro's store it would have the model's parameters."""
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if "." not in self._pyro_name:  # or it is a part of another module, which names it
            made._pyro_set_supermodule(_name(type(self)), made._pyro_context)
        return made

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        super()._pyro_set_supermodule(name, context)
        _ready(context)

    def __getattr__(self, name: str) -> Any:
        """A part, of whose parameters Pyro is told once in a trace, not whenever it is read."""
        parts, context = self.__dict__.get("_modules", {}), self.__dict__.get("_pyro_context")
        if context is None or name not in parts:
            return super().__getattr__(name)
        told = f"{name}: told"
        if context.get(told) is None:
            context.set(told, super().__getattr__(name))
        return parts[name]

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    def model(self, x: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no model")

    def guide(self, x: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no guide")

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x given the guide's summary), (B, C, H, W) in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__} has no reconstruct")

    def sample(self, count: int) -> Tensor:
        """Means of images drawn from the prior, (count, C, H, W) in [0, 1]."""
        return self.draw(count)[0]

    @torch.no_grad()
    @own_parameters()
    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The same with the number of objects in each, (count,); None of a model without objects.
        """
        like = next(self.parameters())
        blank = like.new_zeros(count, *self.image_shape)
        drawn = poutine.trace(poutine.uncondition(self.model)).get_trace(blank)
        return drawn.nodes["x"]["fn"].mean.clamp(0.0, 1.0), self.counts(drawn)

    def counts(self, trace: poutine.Trace) -> Tensor | None:
        """Objects in each image of a trace of the model or the guide, (..., B) long."""
        return None

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the learning rate that they share."""
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in self.rates}
        for name, parameter in self.named_parameters():
            groups[self.group(name.split(".")[0])].append(parameter)
        return groups

    def group(self, part: str) -> str:
        """Which of ``rates`` the parameters of a part have."""
        return self.rates[0]

    def generative(self) -> list[nn.Parameter]:
        """Parameters of p(x, z). All others are the guide's."""
        return [
            parameter for name, parameter in self.named_parameters()
            if self.generates(name.split(".")[0])
        ]

    def generates(self, part: str) -> bool:
        """Whether a part of that name belongs to p(x, z)."""
        return part in self.decoders or part.endswith("_prior")

    def renew(self) -> None:
        """Begin again with some of the parameters, in place, where an objective asks for it."""
        raise NotImplementedError(f"{type(self).__name__} has no renew")

    def check(self, x: Tensor) -> None:
        """:raises UserError: if the images do not suit this model."""
        if not x.is_floating_point():
            raise UserError(f"images are floats from 0 to 1, not {x.dtype}")
        if x.dim() != 4 or x.shape[1] != self.image_shape[0]:
            raise UserError(
                f"the model reads images of {self.image_shape[0]} channels,"
                f" not of shape {tuple(x.shape[1:])}"
            )

    def check_kind(self, x: Tensor) -> None:
        """:raises UserError: as `check`, and for other numbers or another device than the model's.
        """
        self.check(x)
        if x.device != self.device:
            raise UserError(f"images are on {x.device} and the model on {self.device}: move one")
        dtype = next(self.parameters()).dtype
        if x.dtype != dtype:
            raise UserError(f"images are {dtype} as the model, not {x.dtype}")

    def check_values(self, x: Tensor) -> None:
        """The same, and their values, which a density may be asked of whatever they are.

        :raises UserError: as `check_kind`, and for values beyond 0 and 1 or none.
        """
        self.check_kind(x)
        least, most = x.aminmax() if x.numel() else (0.0, 1.0)
        if not (least >= -ROUNDED and most <= 1 + ROUNDED):
            raise UserError(
                f"images are from 0 to 1, not from {least:g} to {most:g}: divide or clamp them"
            )

    def check_sides(self, x: Tensor, stride: int) -> None:
        """:raises UserError: if the sides of the images are no multiples of the stride."""
        height, width = (side + -side % stride for side in x.shape[-2:])
        if (height, width) != x.shape[-2:]:
            raise UserError(
                f"the sides of an image must be multiples of {stride}: pad those of"
                f" {x.shape[-2]} x {x.shape[-1]} pixels to {height} x {width}"
            )

    @contextmanager
    def priors(self, **priors: nn.Module) -> Iterator[None]:
        """Swap priors for a while: ``with model.priors(count=UniformCount(5, 6)): ...``.

        They are moved to where the model is.

        :raises UserError: for a prior that the model does not have.
        """
        before = {name: self.prior(name) for name in priors}
        try:
            for name, prior in priors.items():
                setattr(self, f"{name}_prior", prior.to(self.device))
            yield
        finally:
            for name, prior in before.items():
                setattr(self, f"{name}_prior", prior)

    def prior(self, name: str) -> nn.Module:
        """The prior of a name. :raises UserError: if the model does not have it."""
        if not hasattr(self, f"{name}_prior"):
            raise UserError(f"{type(self).__name__} has no prior called {name!r}")
        return getattr(self, f"{name}_prior")


class SceneModel(GenerativeModel):
    """A model whose latent variables are objects.

    :ivar most: objects that it can find in an image, at most.
    :ivar appearance_site: what its sites of appearance are called, less their numbers.
    :ivar where_site: the same of its places, and ``across`` which of their numbers is x.
    :ivar classes: K, categories of objects; 0 if they have none.
    """

    most: float = math.inf
    classes: int = 0
    appearance_site: str = "z_app"
    where_site: str = "z_where"
    across: int = 0

    def infer(self, x: Tensor, limit: float | None = None) -> Scene:
        """A deterministic summary of the guide.

        :param limit: most objects in an image; the model's own by default.
        :raises UserError: if an image shows more.
        """
        raise NotImplementedError(f"{type(self).__name__} has no infer")

    def counts(self, trace: poutine.Trace) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no counts")

    @staticmethod
    def within(counts: Tensor, limit: float) -> None:
        """:raises UserError: if an image shows more objects than the limit; counts (B,)."""
        if len(counts) and counts.max() > limit:
            raise UserError(
                f"an image shows {int(counts.max())} objects, more than the limit of {limit};"
                " raise it with --max-objects"
            )

    def numbers(self, site: str, value: Tensor) -> Tensor:
        """An object's value (..., K) at a site as numbers that have an order, (..., Q).

        :param site: what it is called, less its number.
        """
        return value

    @torch.no_grad()
    def compose(self, scenes: Any) -> Scene:
        """What `render` draws, from what `Scene.to_json` wrote, perhaps changed, or by hand.

        :param scenes: a list, see `Scene.from_json`.
        :raises UserError: as it does.
        """
        size = self.prior("appearance")().event_shape[0]
        composed = Scene.from_json(
            scenes, appearance=size, classes=self.classes, pose=self.usual_pose()
        )
        like = next(self.parameters())
        composed = composed.each(
            lambda values: values.to(like) if values.is_floating_point() else values.to(like.device)
        )
        return replace(composed, boxes=self.boxes(composed))

    def boxes(self, scene: Scene) -> Tensor:
        """The box of each object's ink, pixels (B, M, 4); NaN where absent, or not known."""
        return scene.boxes

    def usual_pose(self) -> list[float] | None:
        """Of an object of which nothing is said, see `scene.POSE`; None if objects have none."""
        return None

    def render(self, scene: Scene) -> Tensor:
        """The sum of the layers, the mean of p(x given scene), cut off at 1, (B, C, H, W)."""
        return self.layers(scene).sum(1).clamp(0.0, 1.0)

    def layers(self, scene: Scene) -> Tensor:
        """What each object adds to the mean, (B, M, C, H, W), 0 where absent."""
        raise NotImplementedError(f"{type(self).__name__} has no layers")

    def sprites(self, scene: Scene) -> Tensor:
        """Each object alone, (B, M, C, S, S) in [0, 1], 0 where absent."""
        raise NotImplementedError(f"{type(self).__name__} has no sprites")

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.render(self.infer(x))

    @torch.no_grad()
    def segment(self, scene: Scene, threshold: float = 0.5) -> Tensor:
        """The object of each pixel, (B, H, W) long: 0 for background, m + 1 for slot m.

        A pixel belongs to the object that adds most to it, in the channel where it adds most, of
        those whose `ink` it is, and to the background if it is nobody's.
        """
        parts = self.layers(scene).amax(2)  # (B, M, H, W)
        if parts.shape[1] == 0:
            return parts.new_zeros(len(parts), *parts.shape[2:], dtype=torch.long)
        strongest, slot = (parts * self.ink(parts, threshold)).max(1)
        return torch.where(strongest > 0, slot + 1, 0)

    def ink(self, drawn: Tensor, threshold: float) -> Tensor:
        """Which pixels of what is drawn of each object are its ink: those above a threshold.

        Where grey images have an object that is nowhere twice as bright, those above half of its
        brightest. A binary one is as bright as the model is sure of it.

        :param drawn: (..., H, W), from 0 to 1. :return: the same shape, bool.
        """
        if self.likelihood.binary:
            return drawn > threshold
        return drawn > (drawn.amax((-2, -1), keepdim=True) / 2).clamp(max=threshold)


def _name(kind: type) -> str:
    """Of a model in Pyro's store, which no other has."""
    return f"{kind.__name__}-{next(NUMBERS)}"


def family(site: str) -> str:
    """What a site is called, less its number.

    >>> family("z_where_2"), family("x")
    ('z_where', 'x')
    """
    return re.sub(r"_\d+$", "", site)


def _ready(context: Any) -> None:
    """Let what is in a module's context be computed in `own_parameters`, wherever it was made."""
    if not hasattr(context, "param_state"):
        context.param_state = {"params": {}, "constraints": {}}
