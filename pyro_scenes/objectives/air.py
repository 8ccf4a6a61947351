"""The trainings of AIR and Discrete-AIR: an ELBO with annealed temperature or presence prior."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from pyro.infer.enum import get_importance_trace
from pyro.ops.provenance import track_provenance
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_scenes import distributed
from pyro_scenes.errors import UserError
from pyro_scenes.models.air import AIR
from pyro_scenes.models.discrete_air import DiscreteAIR
from pyro_scenes.objectives.base import Objective, falling, surrogate, temporarily
from pyro_scenes.priors import GeometricCount

BASELINE = 1e4  # by which gradients of AIR's baseline are made smaller
HARDLY, SELDOM, OFTEN = 0.5, 0.6, 1.5  # of a category's fair share
COLDEST = 0.4  # temperature: a coordinate of a colder draw may underflow, whose density is infinite


@dataclass(frozen=True)
class DiscreteAIRSchedule:
    """Annealing of Discrete-AIR's training. In steps.

    Defaults are the fast preset's but for ``twin``, which trainings before it had not.
    """

    learning_rate: float = 2e-3  # networks of model and guide
    ramp: int = 100  # learning rates rise over so many steps
    decay_from: float = 0.5  # part of the training after which they fall (cosine)
    decay_to: float = 0.02  # the part of each that is left at the end
    temperature_rate: float = 0.001  # r of max(0.5, exp(-r t)) (appendix C.4)
    temperature_end: float = 0.5  # the least temperature
    attributes_from: int = 1500  # templates alone explain the images up to this step, or half-way
    rescue: float = 1.0  # nats that a category which is hardly used is given, more each step
    balance: float = 0.0  # nats that one used twice its share loses each step, in place of that
    # Each so many steps, up to attributes_from, those used seldom begin again as twins of those
    # used often (fast networks); 0: never.
    twin: int = 0


DISCRETE_PRESETS = {
    "fast": DiscreteAIRSchedule(twin=100),
    "paper": DiscreteAIRSchedule(
        learning_rate=1e-4, ramp=0, decay_to=1.0, temperature_rate=0.005, attributes_from=0,
        rescue=0.0,
    ),
}


class Rescue(nn.Module):
    """Gives a start to categories that are hardly used, until they are.

    In a training alone: which category explains an object is a contest whose winner learns, and a
    template that never wins would never come to look like anything, while another serves two
    kinds of objects. A start wins it what it is nearest to, which may be served already: so one
    that is used seldom, while another serves two kinds, begins again as a twin of that
    (`DiscreteAIR.split`).
    """

    def __init__(self, classes: int, rate: float, balance: float):
        super().__init__()
        self.rate, self.balance = rate, balance
        self.usage = nn.Buffer(torch.full((classes,), 1.0 / classes))  # a running mean, (K,)
        self.start = nn.Buffer(torch.zeros(classes))  # nats, (K,)

    @torch.no_grad()
    def forward(self, used: Tensor) -> None:
        """:param used: (K,), how much each category was used in a batch."""
        if used.sum() > 0:
            self.usage.lerp_(used / used.sum(), 0.02)
        share = len(used) * self.usage  # 1 is fair
        if self.balance:
            excess = (share - 1).clamp(max=1.0)
            self.start.sub_(self.balance * (excess - excess.mean()))
        else:
            hardly = share < HARDLY
            self.start.copy_(torch.where(hardly, self.start + self.rate, 0.98 * self.start))

    @torch.no_grad()
    def twins(self) -> Iterator[tuple[int, int]]:
        """Pairs of a category that is used often and one that is seldom, which then share its use.
        """
        fair = 1 / len(self.usage)
        while True:
            often, seldom = int(self.usage.argmax()), int(self.usage.argmin())
            if self.usage[often] < OFTEN * fair or self.usage[seldom] > SELDOM * fair:
                return
            self.usage[[often, seldom]] = self.usage[often] / 2
            self.start[[often, seldom]] = 0.0
            yield often, seldom


class DiscreteAIRObjective(Objective):
    """The ELBO with relaxed z_cat and z_pres (section 2.3, appendix C).

    Relaxed in the prior too, so that its density is one of what is drawn; C.2 has a categorical one
    for z_cat.

    z_cat is exact in the fast preset: what its guide chooses by learns from the likelihood alone.
    The divergence is by the draw, of the normal sites too; the paper needs that for the relaxed.

    :raises UserError: for a temperature that float32 has no room for.
    """

    def __init__(self, schedule: DiscreteAIRSchedule, model: DiscreteAIR, steps: int):
        super().__init__(schedule, model, steps)
        if schedule.temperature_end < COLDEST:
            raise UserError(f"temperature_end must be at least {COLDEST} for discrete-air")
        # In a short training too: a code that no step has taught would spoil every template.
        self.attributes_from = min(schedule.attributes_from, steps // 2)
        self.rescue = Rescue(model.classes, schedule.rescue, schedule.balance)
        self.modules["rescue"] = self.rescue

    def learning_rates(self, step: int) -> dict[str, float]:
        return super().learning_rates(step) | {"rescue": 0.0}

    def loss(
        self, model: DiscreteAIR, x: Tensor, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """What has the gradients of one batch, and figures to log, nats per image."""
        s = self.schedule
        used = x.new_zeros(model.classes)

        def guide(x: Tensor) -> None:
            for found in model.guide(x):
                weighted = found["z_cat"] * found["here"].unsqueeze(-1)
                used.add_(weighted.detach().sum(0))

        # Later an attribute would turn a category that is given a start into another's kind.
        early = step < self.attributes_from
        if early and s.twin and step % s.twin == s.twin - 1 and model.config.networks == "fast":
            for number, twins in enumerate(self.rescue.twins()):
                model.split(*twins, seed=model.classes * step + number)
        settings = {
            "temperature": max(s.temperature_end, math.exp(-s.temperature_rate * step)),
            "attributes_on": float(not early),
            "start": self.rescue.start.clone() if early and (s.rescue or s.balance) else None,
        }
        with temporarily(model, **settings), poutine.scale(scale=1 / len(x)):
            figure, loss = surrogate(self.elbo, model.model, guide, x)
        if early:
            self.rescue(distributed.total(used))
        return loss, {"loss": figure, "least used": float(self.rescue.usage.min())}


@dataclass(frozen=True)
class AIRSchedule:
    """Annealing of AIR's training; defaults are the fast preset's. In steps."""

    learning_rate: float = 2e-3  # networks of model and guide
    baseline_learning_rate: float = 1e-2  # of z_pres's baselines
    ramp: int = 100  # learning rates rise over so many steps
    decay_from: float = 0.5  # part of the training after which they fall (cosine)
    decay_to: float = 0.02  # the part of each that is left at the end
    more: float = 0.9  # of the geometric prior at first; falls to the model's own
    more_begin: int = 100  # from this step on,
    more_end: int = 500  # to this one


AIR_PRESETS = {
    "fast": AIRSchedule(),
    "paper": AIRSchedule(
        learning_rate=1e-4, baseline_learning_rate=1e-3, ramp=0, decay_to=1.0,
        more_begin=10_000, more_end=100_000,
    ),
}


class OrderedGraph_ELBO(TraceGraph_ELBO):
    """TraceGraph_ELBO of a guide in which each draw may depend on all draws before it, as AIR's.

    What depends on a discrete site is then known from the order of the sites. TraceGraph_ELBO
    finds it out by tracking every operation on a draw, which takes a third of a step of AIR.
    """

    def _get_trace(self, model, guide, args, kwargs):
        joint, posterior = get_importance_trace(
            "flat", self.max_plate_nesting, model, guide, args, kwargs
        )
        drawn: frozenset[str] = frozenset()
        for name, site in posterior.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                if not site["fn"].has_rsample:
                    drawn |= {name}
                _depend(site, drawn)
                _depend(joint.nodes[name], drawn)
        for site in joint.observation_nodes:
            _depend(joint.nodes[site], drawn)
        return joint, posterior


def _depend(site: dict, drawn: frozenset[str]) -> None:
    """Tell TraceGraph_ELBO that a site's density depends on these draws; it asks the sum."""
    site["log_prob_sum"] = track_provenance(site["log_prob_sum"], drawn)


class AIRObjective(Objective):
    """The ELBO with scores of z_pres less their baselines, by TraceGraph_ELBO."""

    def __init__(self, schedule: AIRSchedule, model: AIR, steps: int):
        super().__init__(schedule, model, steps)
        self.elbo = OrderedGraph_ELBO()

    def learning_rates(self, step: int) -> dict[str, float]:
        baseline = self.decay(step) * self.schedule.baseline_learning_rate
        return super().learning_rates(step) | {"baseline": baseline}

    def loss(
        self, model: AIR, x: Tensor, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """What has the gradients of one batch, and figures to log, nats per image."""
        s, c = self.schedule, model.config
        more = falling(step, s.more, c.more, s.more_begin, s.more_end)
        prior = GeometricCount(more, c.max_objects).to(x.device)
        with temporarily(model, count_prior=prior):
            figure, loss = surrogate(self.elbo, model.model, model.guide, x)
        return loss, {"loss": figure / len(x)}

    def settle(self, model: AIR, images: int) -> None:
        """From a sum over images to their mean.

        Not by poutine.scale: baselines are in nats of an image.
        """
        for name, parameters in model.groups().items():
            # The baseline's squared error, in nats, must not fill the norm that is clipped; its
            # optimiser does not mind a factor.
            factor = images * (BASELINE if name == "baseline" else 1.0)
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= factor
