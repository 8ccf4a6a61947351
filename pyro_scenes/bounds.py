"""Bounds on log p(x) by importance sampling, and where their nats go.

Particles z_k of the guide have weights w_k = p(x, z_k) / q(z_k | x), with exact discrete masses on
both sides. The bound of K of them is log((w_1 + ... + w_K) / K) (Burda et al. 2016). Its
expectation is the ELBO for K = 1, and rises with K to log p(x).

Weights come in chunks of particles and go into running sums, so that memory does not grow with the
number of particles. One pass gives the bound at several K: where N particles are drawn in all, that
of K is the mean over N // K groups with no particle in common. It has the expectation of a bound of
K particles drawn alone, and varies less. What is left over of N counts at the largest K alone.

All are in nats, per image.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm import tqdm

from pyro_scenes import distributed
from pyro_scenes.data import SceneData
from pyro_scenes.errors import UserError
from pyro_scenes.machine import at_a_time, in_mode, keep_memory, own_parameters
from pyro_scenes.models import GenerativeModel, base

# Particles times images at a time. On a CPU, larger tensors than those of so many images are memory
# that the system gives and takes back at every operation, which takes as long as the arithmetic.
CHUNKS = defaultdict(lambda: 100, cuda=1000)
# Nats that stand for an infinite number of them: what an image costs whose count cannot be, which a
# presence gives priors.NEVER for, and a count -inf.
IMPOSSIBLE = 1e20
RECONSTRUCTION = "reconstruction"


@dataclass(frozen=True)
class Estimate:
    """What was found for each of N images, float64."""

    particles: tuple[int, ...]  # K, rising; the last is the number that was drawn
    bounds: Tensor  # (len(particles), N), on log p(x)
    # Effective sample size of all particles, (sum w)^2 / sum w^2, (N,): from 1, where one weight
    # outweighs the others, to K, where all are alike. 0 where all weights are 0.
    effective: Tensor
    # The bound at K = 1, negated, in parts, (N,) each: "reconstruction" is the mean over particles
    # of -log p(x | z), and the others, named after the latent sites without their index, are the
    # means of log q - log p, whose expectation is the KL divergence of these sites.
    split: dict[str, Tensor]

    @staticmethod
    def concatenate(parts: Sequence[Estimate]) -> Estimate:
        """All images in one, on the CPU. A site that some images lack adds 0 to theirs."""
        names = list(dict.fromkeys(name for part in parts for name in part.split))
        return Estimate(
            parts[0].particles,
            torch.cat([part.bounds for part in parts], 1).cpu(),
            torch.cat([part.effective for part in parts]).cpu(),
            {
                name: torch.cat([
                    part.split.get(name, torch.zeros_like(part.effective)) for part in parts
                ]).cpu()
                for name in names
            },
        )


def applies(model: GenerativeModel, data: SceneData) -> bool:
    """Whether the model has a density for such images: a Bernoulli one is of binary ones alone."""
    return data.binary or not model.likelihood.binary


def sizes(particles: int) -> tuple[int, ...]:
    """The powers of ten below the number of particles, and that number.

    >>> sizes(250)
    (1, 10, 100, 250)
    """
    return *(10**i for i in range(len(str(particles))) if 10**i < particles), particles


@torch.no_grad()
def estimate(
    model: GenerativeModel, x: Tensor, particles: int, chunk: int | None = None
) -> Estimate:
    """The bounds of some images at K = 1, 10, 100 ... up to the number of particles.

    :param x: (B, C, H, W), which are encoded once a chunk.
    :param chunk: most particles times images at a time, to which memory is in proportion; but of
        each image one particle at least. By default what suits the device.
    """
    running = [_Groups(size, len(x), x.device) for size in sizes(particles)]
    squares = torch.full((len(x),), -math.inf, dtype=torch.double, device=x.device)
    split: dict[str, Tensor] = {}
    for terms in _chunks(model, x, particles, chunk):
        weights = _total(terms)  # (k, B)
        for groups in running:
            groups.add(weights)
        squares = torch.logaddexp(squares, (2 * weights).logsumexp(0))
        for name, term in terms.items():
            part = -term.sum(0) / particles
            split[name] = split[name] + part if name in split else part
    bounds = torch.stack([groups.bound() for groups in running])
    total = bounds[-1] + math.log(particles)
    # Where all weights are 0 their logarithms are infinite, and the difference is no number.
    effective = (2 * total - squares).exp().nan_to_num(0.0).masked_fill(total < -IMPOSSIBLE, 0.0)
    return Estimate(sizes(particles), bounds, effective, split)


def measure(
    model: GenerativeModel,
    data: SceneData,
    particles: int,
    chunk: int | None = None,
    progress: bool = False,
    seed: int | None = None,
) -> Estimate:
    """The same for a whole data set, as many images at a time as the chunk allows.

    :param seed: seeds the draws for each chunk anew, from it and the chunk's place: the result is
        that of any number of processes. By default they go on from where the generator is.

    >>> from pyro_scenes import checkpoint, data
    >>> model = checkpoint.load("air-multi-sprites").model
    >>> found = measure(model, data.load("multi-sprites", images=2), particles=20)
    >>> found.particles, found.bounds.shape
    ((1, 10, 20), torch.Size([3, 2]))
    >>> list(found.split)
    ['reconstruction', 'z_pres', 'z_where', 'z_what']
    """
    device = model.device
    _check(len(data), particles)
    chunk = chunk or at_a_time(CHUNKS[device.type], *data.shape[:2])
    size = max(1, chunk // particles)
    keep_memory()
    silent = not progress or distributed.rank() > 0
    with tqdm(total=len(data), desc="likelihood", unit="image", disable=silent) as bar:

        def estimated(start: int) -> Estimate:
            if seed is not None:
                torch.manual_seed(distributed.seed(seed, start))
            x = data.batch(slice(start, start + size)).to(device)
            part = estimate(model, x, particles, chunk)
            bar.update(min(len(x) * distributed.world(), len(data) - bar.n))
            return Estimate.concatenate([part])

        with in_mode(model, training=False):
            parts = distributed.mapped(estimated, range(0, len(data), size))
    return Estimate.concatenate(parts)


def iwae(
    model: GenerativeModel, x: Tensor, particles: int, chunk: int | None = None
) -> Tensor:
    """The bound of all particles, (B,)."""
    return estimate(model, x, particles, chunk).bounds[-1].to(x.dtype)


@torch.no_grad()
def log_weights(
    model: GenerativeModel, x: Tensor, particles: int, chunk: int | None = None
) -> Tensor:
    """log p(x, z_k) - log q(z_k | x), (K, B), see `estimate`."""
    return torch.cat([_total(terms).to(x.dtype) for terms in _chunks(model, x, particles, chunk)])


class _Groups:
    """The bound at one K, as the weights of all particles go by."""

    def __init__(self, size: int, images: int, device: torch.device):
        self.size = size  # K
        self.count = 0  # of groups that are complete
        self.sum = torch.zeros(images, dtype=torch.double, device=device)  # of their bounds + log K
        self.filled = 0  # particles in the group that is not
        self.open = torch.full_like(self.sum, -math.inf)  # log of the sum of their weights

    def add(self, weights: Tensor) -> None:
        """:param weights: log w, (k, B)."""
        first = min(self.size - self.filled, len(weights)) if self.filled else 0
        whole = (len(weights) - first) // self.size * self.size
        head, middle, tail = weights.split([first, whole, len(weights) - first - whole])
        self._fill(head)
        self.sum += middle.unflatten(0, (whole // self.size, self.size)).logsumexp(1).sum(0)
        self.count += whole // self.size
        self._fill(tail)

    def _fill(self, weights: Tensor) -> None:
        self.open = torch.logaddexp(self.open, weights.logsumexp(0))
        self.filled += len(weights)
        if self.filled == self.size:
            self.sum += self.open
            self.count += 1
            self.open, self.filled = torch.full_like(self.open, -math.inf), 0

    def bound(self) -> Tensor:
        """(B,), when all have gone by."""
        return self.sum / self.count - math.log(self.size)


def _chunks(
    model: GenerativeModel, x: Tensor, particles: int, chunk: int | None
) -> Iterator[dict[str, Tensor]]:
    _check(len(x), particles)
    model.check_kind(x)
    step = max(1, (chunk or CHUNKS[x.device.type]) // len(x))
    for start in range(0, particles, step):
        yield _terms(model, x, min(step, particles - start))


def _check(images: int, particles: int) -> None:
    """:raises UserError: if there is nothing to measure a bound on, or with."""
    if not images:
        raise UserError("there are no images to measure a bound on: give at least 1")
    if particles < 1:
        raise UserError(f"a bound takes at least 1 particle, not {particles}")


@own_parameters()
def _terms(model: GenerativeModel, x: Tensor, particles: int) -> dict[str, Tensor]:
    """log p - log q of each family of sites, (K, B): of latent ones, and of all observed ones.

    In float64, so that what is made of the parts agrees with what is made of their sum.
    """
    with pyro.plate("particles", particles, dim=-2):
        guide = poutine.trace(model.guide).get_trace(x)
        joint = poutine.trace(poutine.replay(model.model, trace=guide)).get_trace(x)
    guide.compute_log_prob()
    joint.compute_log_prob()
    nothing = torch.zeros(particles, len(x), dtype=torch.double, device=x.device)
    terms = {RECONSTRUCTION: nothing}
    for trace, sign in ((joint, 1.0), (guide, -1.0)):
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                family = RECONSTRUCTION if site["is_observed"] else base.family(name)
                terms[family] = terms.get(family, nothing) + sign * site["log_prob"]
    return terms


def _total(terms: dict[str, Tensor]) -> Tensor:
    """log w, (K, B)."""
    return torch.stack(list(terms.values())).sum(0)
