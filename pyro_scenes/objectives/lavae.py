"""LAVAE's training: the ELBO with forced counts, probes, annealing, and the warm-up."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pyro
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_scenes import distributed, swaps
from pyro_scenes.data import SceneData
from pyro_scenes.errors import UserError
from pyro_scenes.likelihoods import BernoulliImage
from pyro_scenes.models.conv_vae import AUXILIARY, ConvVAE
from pyro_scenes.models.lavae import LAVAE, Encoded
from pyro_scenes.objectives import dreams
from pyro_scenes.objectives.base import (
    Objective,
    Weighted,
    decayed,
    falling,
    linear,
    surrogate,
    temporarily,
)
from pyro_scenes.priors import Fitted, StandardNormal

TINY = 1e-6  # nats, of a KL map that is the same everywhere
SLEEP = 6  # Dreams take one of so many steps of a training, at most.


@dataclass(frozen=True)
class LAVAESchedule:
    """Annealing and warm-up of LAVAE's training, in steps.

    Defaults are the fast preset's, but for its dreams and its exact divergence.
    """

    learning_rate: float = 5e-3  # appearance network and sprite decoder
    location_learning_rate: float = 1e-3  # location network
    prior_learning_rate: float = 2e-2  # logits of p(n)
    ramp: int = 100  # learning rates rise over so many steps
    decay_from: float = 0.3  # part of the training after which they fall (cosine)
    decay_to: float = 0.01  # the part of each that is left at the end
    # Steps over which the location map's falls to a hundredth, geometrically; 0: as the others.
    location_decay: int = 0
    temperature: float = 1.0  # of the places' Gumbel-softmax gradient
    temperature_end: float = 0.5  # to which it falls
    temperature_steps: int = 1000  # within so many steps
    slope: float = 5.0  # limit of the places' gradient, nats a pixel; 0 for none
    reach: int = 5  # of that gradient round a drawn place, pixels; 0 for everywhere
    floor: float = 0.03  # of Bernoulli means; falls to the model's own
    floor_begin: int = 600  # from this step on,
    floor_end: int = 2400  # to this one
    one_object: int = 150  # n is forced to 1 in all images up to this step,
    one_object_end: int = 200  # ever less often until this one,
    one_object_left: float = 0.0  # and this often from then on
    location_every: int = 2  # the location map learns in one of so many steps,
    location_settled: int = 1500  # from this one on
    exact_divergence: bool = False  # of z_app where p(z_app) is a normal; or by its draw
    # In the last so many steps before the fit, or a sixth of all, the location map alone learns,
    dreams: int = 0
    dream_learning_rate: float = 3e-4  # this fast, from dreams
    rest_from: float = 1.0  # part of the training after which places rest
    fit_from: float = 1.0  # part of it after which p(z_app) is one that was fitted, and learns
    appearance_beta: float = 1.0  # weight of z_app's divergence while places rest, until then
    appearance_anew: bool = False  # whether its networks begin again when places come to rest
    probe: float = 0.1  # how often one object more than counted is drawn; 0 when places rest
    warmup_full: int = 200  # the location map mimics the auxiliary VAE's KL map up to this step,
    warmup_end: int = 400  # ever less until this one
    warmup_weight: float = 0.5  # of the squared distance, summed over pixels
    warmup_height: float = 3.5  # of the target's peaks, in units of h_loc
    warmup_blur: float = 3.5  # standard deviation, pixels
    auxiliary_learning_rate: float = 2e-3  # auxiliary VAE; neither rises nor falls


PAPER = LAVAESchedule(
    learning_rate=1e-3,
    location_learning_rate=5e-4,
    prior_learning_rate=1e-3,
    ramp=0,
    decay_from=1.0,
    location_decay=100_000,
    auxiliary_learning_rate=1e-3,
    temperature=0.5,
    temperature_end=0.02,
    temperature_steps=100_000,
    floor=1e-5,
    floor_begin=0,
    floor_end=0,
    one_object=30_000,
    one_object_end=60_000,
    one_object_left=0.1,
    location_every=1,
    location_settled=0,
    exact_divergence=True,
    probe=0.0,
    slope=0.0,
    reach=0,
    warmup_full=30_000,
    warmup_end=60_000,
    warmup_weight=1.0,
    warmup_height=0.0,
    warmup_blur=0.0,
)
PRESETS = {"fast": LAVAESchedule(dreams=500, exact_divergence=True), "paper": PAPER}


class PlacesFirstELBO(TraceMeanField_ELBO):
    """TraceMeanField_ELBO of a guide that draws all places before any appearance.

    Pyro warns of another order of sites than the model's, in which a density could depend on what
    the exact divergence leaves out; here p(z_app) depends on nothing, and no place on z_app.
    """

    def _get_trace(self, model, guide, args, kwargs):
        return Trace_ELBO._get_trace(self, model, guide, args, kwargs)


class LAVAEObjective(Objective):
    """The ELBO (eq. 6), with the warm-up of appendix B, places at rest, and a sleep phase.

    First all learns by the ELBO, then all but the location map, where a step costs half, then the
    location map alone, from dreams (dreams.py), for which sprites are good by now, and again all
    but it.

    Up to ``fits`` the prior of appearances is N(0, I). While places rest its divergence weighs
    ``appearance_beta``. If that is little, codes tell all that they can, which the prior that is
    then fitted to them (a mixture, for objects of a finite number) has cheaply. Before, places
    would not become sharp: where codes are cheap they tell offsets too. Networks that have learnt
    to say little do not unlearn it soon: ``appearance_anew``.

    :raises UserError: for settings that contradict each other.
    """

    def __init__(self, schedule: LAVAESchedule, model: LAVAE, steps: int):
        super().__init__(schedule, model, steps)
        if schedule.exact_divergence:
            self.elbo = PlacesFirstELBO()
        c = model.config
        usual = AUXILIARY.get(c.networks, AUXILIARY["fast"])
        alike = replace(usual, likelihood=c.likelihood, sigma=c.sigma)
        self.auxiliary = ConvVAE(alike, model.image_shape)
        if schedule.dreams and not model.config.count_softness:
            raise UserError("dreams teach counts by their gradient: set count_softness above 0, or"
                            " dreams to 0")
        if schedule.appearance_anew and schedule.rest_from >= 1:
            raise UserError("appearance_anew is of networks when places come to rest: set rest_from"
                            " below 1")
        if schedule.appearance_beta != 1 and max(schedule.rest_from, schedule.fit_from) >= 1:
            raise UserError("appearance_beta counts while places rest, until p(z_app) is fitted:"
                            " set rest_from and fit_from below 1")
        self.modules["auxiliary"] = self.auxiliary
        end = steps
        self.fits: int | None = None
        if schedule.fit_from < 1:
            self.fits = end = min(round(schedule.fit_from * steps), steps - 1)
            self.events[end] = fit_prior
        # The first step of each phase: of dreams, and of places at rest.
        self.dreaming, self.waking = end - min(schedule.dreams, steps // SLEEP, end), end
        self.resting = min(round(schedule.rest_from * steps), self.dreaming)
        if schedule.appearance_anew and self.resting < self.dreaming:
            self.events[self.resting] = lambda model, data: model.renew()

    def sleeps(self, step: int) -> bool:
        return self.dreaming <= step < self.waking

    def rests(self, step: int) -> bool:
        return self.resting <= step < self.steps and not self.sleeps(step)

    def learning_rates(self, step: int) -> dict[str, float]:
        s = self.schedule
        # What learns up to the end of the training, and what does up to the rest of places.
        last = self.dreaming if self.waking == self.steps else self.steps
        long, short = (
            decayed(step, steps, s.ramp, s.decay_from, s.decay_to) for steps in (last, self.resting)
        )
        location = s.location_learning_rate
        if s.location_decay:
            location *= falling(step, 1.0, 0.01, 0, s.location_decay)
        else:
            location *= short
        if self.sleeps(step):
            lasting = self.waking - self.dreaming
            part = decayed(step - self.dreaming, lasting, s.ramp, 0.0, s.decay_to)
            location = part * s.dream_learning_rate
        return {
            "location": location,
            "prior": short * s.prior_learning_rate,
            "rest": long * s.learning_rate,
            "auxiliary": s.auxiliary_learning_rate,
        }

    def loss(
        self, model: LAVAE, x: Tensor, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """What has the gradients of one batch, and figures to log, nats per image."""
        s = self.schedule
        if self.sleeps(step):
            surprise = dreams.surprise(model, *dreams.dream(model, x)).mean()
            return surprise, {"surprise": float(surprise.detach())}
        weight = s.warmup_weight * (1 - linear(step, s.warmup_full, s.warmup_end))
        target, auxiliary = None, None
        if weight > 0:
            with poutine.scale(scale=1 / len(x)):
                _, auxiliary = surrogate(
                    self.elbo, self.auxiliary.model, self.auxiliary.guide, x
                )
            target = self.location_target(self.auxiliary.kl_map(x), (x.shape[-2], x.shape[-1]))
        forced = 1 - (1 - s.one_object_left) * linear(step, s.one_object, s.one_object_end)
        probe = s.probe * (1 - linear(step, 0, self.resting))
        located = step < s.location_settled or step % s.location_every == 0
        located = located and not self.rests(step)
        unfitted = self.fits is not None and step < self.fits
        beta = s.appearance_beta if unfitted and self.rests(step) else 1.0
        plain = {"appearance": StandardNormal(model.config.latent).to(x.device)} if unfitted else {}
        penalty = torch.zeros(())
        inferred = 0.0

        def guide(x: Tensor) -> None:
            nonlocal penalty, inferred
            probed = torch.rand(len(x), device=x.device) < probe
            with torch.set_grad_enabled(located):
                encoded = model.encode(x, probed)
            inferred = (encoded.count - probed.float()).mean().item()
            if target is not None:
                # Per image, summed over pixels. In Pyro's terms a factor of the guide.
                penalty = weight * (encoded.heights - target).square().sum()
                pyro.factor("warmup", penalty, has_rsample=True)
            alone = torch.rand(len(x), device=x.device) < forced
            count = torch.where(alone, 1, encoded.count)
            model.guide(x, Encoded(encoded.heights, count, probed & ~alone))

        temperature = falling(step, s.temperature, s.temperature_end, 0, s.temperature_steps)
        softened = {}
        if isinstance(model.likelihood, BernoulliImage):
            least = model.config.likelihood_floor
            softened["floor"] = falling(step, s.floor, least, s.floor_begin, s.floor_end)
        with (
            temporarily(
                model,
                temperature=temperature,
                slope=s.slope / len(x) or None,
                reach=s.reach or None,
                slots=int(distributed.world() > 1),
            ),
            temporarily(model.likelihood, **softened),
            model.priors(**plain),
            Weighted(model.appearance_site, beta),
            poutine.scale(scale=1 / len(x)),
        ):
            figure, loss = surrogate(self.elbo, model.model, guide, x)
        left = float(penalty.detach()) / len(x)
        loss = loss if auxiliary is None else loss + auxiliary
        return loss, {"loss": figure - left, "warmup": left, "objects": inferred}

    def location_target(self, kl: Tensor, size: tuple[int, int]) -> Tensor:
        """From the KL map of the auxiliary VAE to heights that the location map should mimic.

        The paper takes the map as it is (``warmup_height`` 0). It is coarse, with several maxima
        an object, so the fast preset takes away its median, interpolates, blurs, divides by the
        largest value nearby and sharpens, which leaves one peak an object.

        :param kl: (B, h, w) nats. :return: (B, H, W).
        """
        s = self.schedule
        if s.warmup_height == 0:
            return F.interpolate(kl[:, None], size=size, mode="nearest")[:, 0]
        kl = (kl - kl.flatten(1).median(1).values[:, None, None]).clamp(min=0)
        fine = F.interpolate(kl[:, None], size=size, mode="bilinear", align_corners=False)
        smooth = _blur(fine, s.warmup_blur)
        nearby = F.max_pool2d(smooth, 21, stride=1, padding=10)
        # Where nothing is nearby, noise must not be blown up to a peak.
        least = 0.3 * distributed.gathered(smooth.flatten(1).amax(1)).quantile(0.9)
        return s.warmup_height * (smooth / nearby.clamp(min=least.clamp(min=TINY))).pow(3)[:, 0]


def fit_prior(model: LAVAE, data: SceneData) -> None:
    """Fit p(z_app), if it can be, to what the guide finds in the first scenes of the training."""
    prior = model.prior("appearance")
    if not isinstance(prior, Fitted):
        return

    def fitted() -> dict[str, Tensor]:
        model.eval()
        with pyro.validation_enabled(False):
            found = swaps.look(model, data[: prior.scenes], progress=False)
            swaps.fit(prior, found, progress=False)
        return prior.state_dict()

    prior.load_state_dict(distributed.shared(fitted))


def _blur(x: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of (B, 1, H, W), zero beyond the edges."""
    if deviation == 0:
        return x
    reach = int(3 * deviation)
    offsets = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / deviation) ** 2)
    kernel = kernel / kernel.sum()
    x = F.conv2d(x, kernel[None, None, :, None], padding=(reach, 0))
    return F.conv2d(x, kernel[None, None, None, :], padding=(0, reach))
