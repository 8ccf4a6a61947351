"""Discrete sites with exact masses, and relaxed gradients where a training wants them."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

# Far below any logit a network gives, yet finite: 0 * USED is 0, where 0 * -inf would be NaN.
USED = -1e6


class OneHotPlace(TorchDistribution):
    """A one-hot vector over D places: exact mass, Gumbel-softmax gradient.

    A draw takes the place with the largest Gumbel-perturbed logit, so its distribution is exactly
    ``Cat(softmax(logits))`` and ``log_prob`` is that categorical's mass. Only the gradient is
    relaxed: it is that of the Gumbel-softmax vector at ``temperature`` (Jang et al. 2016), and
    biased for it; models/lavae.py says by how much. The same class therefore serves training and
    evaluation.

    :param logits: (..., D), not necessarily normalised.
    :param temperature: positive; None for an exact draw without gradient.
    :param hard: draw a one-hot vector (straight-through); if False, and with a temperature, draw
        the relaxed vector itself, whose ``log_prob`` is the mass extended linearly, z . log b.
        That bounds nothing: use it in training only.
    """

    arg_constraints = {"logits": constraints.real_vector}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self, logits: Tensor, temperature: float | None = None, hard: bool = True):
        self.logits = logits.log_softmax(-1)  # (..., D)
        self.temperature = temperature
        self.hard = hard
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None) -> OneHotPlace:
        logits = self.logits.expand(*batch_shape, self.logits.shape[-1])
        return OneHotPlace(logits, self.temperature, self.hard)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        logits = self.logits.expand(self._extended_shape(sample_shape))
        # Gumbel noise, -log(-log u), in place: this is where a draw's time goes.
        perturbed = logits - torch.rand_like(logits).log_().neg_().log_()
        if self.temperature is None or (self.hard and not logits.requires_grad):
            return one_hot(perturbed.argmax(-1), logits.shape[-1], logits.dtype)
        soft = (perturbed / self.temperature).softmax(-1)
        if not self.hard:
            return soft
        # The argmax of the logits, not of the softmax, which may tie after underflow.
        drawn = one_hot(perturbed.detach().argmax(-1), logits.shape[-1], logits.dtype)
        return drawn + (soft - soft.detach())

    def log_prob(self, value: Tensor) -> Tensor:
        return (value * self.logits).sum(-1)


def one_hot(index: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(...) long -> (..., size) with a single one."""
    zeros = torch.zeros(*index.shape, size, dtype=dtype, device=index.device)
    return zeros.scatter_(-1, index.unsqueeze(-1), 1.0)
