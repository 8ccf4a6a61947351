"""The plain objective, and what others share: what changes with the step, or is set for a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.util import torch_item
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_scenes.data import SceneData
from pyro_scenes.machine import own_parameters
from pyro_scenes.models import GenerativeModel

LEAST = 1e-6  # weight of a density: Pyro refuses a scale of 0


@dataclass(frozen=True)
class Schedule:
    """Learning rate of a training that anneals nothing. In steps."""

    learning_rate: float = 1e-3
    ramp: int = 100  # it rises over so many steps
    decay_from: float = 0.5  # part of the training after which it falls (cosine)
    decay_to: float = 0.02  # the part of it that is left at the end


class Objective:
    """-ELBO by one draw of the guide, of any model; the base of the models' own objectives.

    :ivar elbo: one of Pyro's with a ``differentiable_loss``, or TraceGraph_ELBO; for others, such
        as RenyiELBO, override ``backward``.
    :ivar modules: what is trained and kept beside the model; their names are groups of parameters.
    :ivar events: step -> what is done once before it, with the model and the training's data.
    :param schedule: a dataclass of settings, with those of ``Schedule`` unless a subclass has other
        learning rates.
    :param steps: length of the training, for the decay of the learning rates.
    """

    def __init__(self, schedule: Any, model: GenerativeModel, steps: int):
        self.schedule, self.steps = schedule, steps
        self.groups = list(model.groups())
        self.elbo = Trace_ELBO()
        self.modules = nn.ModuleDict()
        self.events: dict[int, Callable[[Any, SceneData], None]] = {}

    def decay(self, step: int) -> float:
        """What learning rates are multiplied by, 0 to 1."""
        s = self.schedule
        return decayed(step, self.steps, s.ramp, s.decay_from, s.decay_to)

    def learning_rates(self, step: int) -> dict[str, float]:
        """For each group of the model's parameters; of ``modules``, what a subclass adds."""
        return dict.fromkeys(self.groups, self.decay(step) * self.schedule.learning_rate)

    def loss(self, model: Any, x: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        """What has the gradients of one batch, and figures to log, nats per image.

        Both are means over images, so that those of the parts of a batch, of one size, average to
        those of the whole. What is read of a whole batch comes from `distributed`.

        :param x: (B, C, H, W) in [0, 1]. :param step: from 0 on.
        """
        with poutine.scale(scale=1 / len(x)):
            figure, loss = surrogate(self.elbo, model.model, model.guide, x)
        return loss, {"loss": figure}

    def settle(self, model: Any, images: int) -> None:
        """What is left to do when the gradients of a batch of so many images are there."""

    def backward(self, model: Any, x: Tensor, step: int) -> dict[str, float]:
        """Gradients of the loss of one batch; returns figures to log, nats per image."""
        loss, figures = self.loss(model, x, step)
        loss.backward()
        self.settle(model, len(x))
        return figures


@own_parameters()
def surrogate(
    elbo: ELBO, model: Callable, guide: Callable, x: Tensor
) -> tuple[float, Tensor]:
    """The loss, and what has its gradients: ``elbo.loss_and_grads``, before it goes backward.

    The same as ``elbo.differentiable_loss``, which TraceGraph_ELBO lacks and which rounds the loss.

    :param x: (B, C, H, W), what model and guide are called with.
    """
    if isinstance(elbo, TraceGraph_ELBO):
        bound, loss = elbo._loss_and_surrogate_loss(model, guide, (x,), {})
        return -torch_item(bound), loss
    if not isinstance(elbo, Trace_ELBO) or elbo.num_particles > 1:
        loss = elbo.differentiable_loss(model, guide, x)
        return torch_item(loss), loss
    (traces,) = elbo._get_traces(model, guide, (x,), {})
    return elbo._differentiable_loss_particle(*traces)


class Weighted(Messenger):
    """Multiplies the log density of some sites, in model and guide alike, by a weight, beta.

    :param site: what they are called, but for a number. :param weight: >= 0.
    """

    def __init__(self, site: str, weight: float):
        super().__init__()
        self.site, self.weight = site, max(weight, LEAST)

    def _pyro_sample(self, message: dict) -> None:
        if message["name"].rstrip("_0123456789") == self.site:
            message["scale"] = self.weight * message["scale"]


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
    return factor * linear(step, -1, ramp)
