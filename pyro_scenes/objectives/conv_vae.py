"""The training of the convolutional VAE: an ELBO with a rising weight of the divergence, beta."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_scenes.models.conv_vae import ConvVAE
from pyro_scenes.objectives.base import LEAST, Objective, Weighted, linear, surrogate


@dataclass(frozen=True)
class ConvVAESchedule:
    """Annealing of the convolutional VAE's training; defaults are the fast preset's."""

    learning_rate: float = 2e-3  # all networks
    ramp: int = 100  # learning rates rise over so many steps
    decay_from: float = 0.0  # part of the training after which they fall (cosine)
    decay_to: float = 0.02  # the part of each that is left at the end
    beta_full: float = 0.8  # part of the training over which beta rises from 0, in a line, to 1


PRESETS = {
    "fast": ConvVAESchedule(),
    "paper": ConvVAESchedule(learning_rate=1e-3, ramp=0, decay_to=1.0, beta_full=0.5),
}


class ConvVAEObjective(Objective):
    """-E[log p(x | z)] + beta KL(q(z | x) || p(z)), the first by one draw of z (LAVAE, appendix B).

    The divergence, of two normals, is exact: by that draw too its gradient is so noisy that a
    training ends a tenth of its nats higher (RUNS.md).
    """

    def __init__(self, schedule: ConvVAESchedule, model: ConvVAE, steps: int):
        super().__init__(schedule, model, steps)
        self.elbo = TraceMeanField_ELBO()
        self.rise = round(schedule.beta_full * steps)

    def loss(
        self, model: ConvVAE, x: Tensor, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """What has the gradients of one batch, and figures to log, nats per image.

        The loss that is logged is the ELBO's, as if beta were 1 already.
        """
        beta = max(LEAST, linear(step, 0, self.rise))
        joint, guide = poutine.trace(model.model), poutine.trace(model.guide)
        with Weighted("z", beta), poutine.scale(scale=1 / len(x)):
            loss, weighted = surrogate(self.elbo, joint, guide, x)
        with torch.no_grad():
            divergence = sum(
                float(kl_divergence(site["fn"], joint.trace.nodes[name]["fn"]).mean())
                for name, site in guide.trace.nodes.items() if name.startswith("z_")
            )
        return weighted, {"loss": loss + (1 - beta) * divergence, "kl": divergence, "beta": beta}
