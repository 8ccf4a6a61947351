"""LAVAE: location and appearance apart (Disentangling Location and Appearance, ICLR 2020 review).

The joint density (eq. 1), for n objects on a canvas of D = H * W places::

    p(x, z_loc, z_app, n) = p(n) prod_{i<n} p(z_loc_i | z_loc_<i) p(z_app_i)
                            prod_d p(x_d | lambda_d)
    lambda = sum_{i<n} f_sprite(z_app_i) * z_loc_i                  (eq. 4; * is convolution)

and the guide (eq. 5)::

    q(z_app, z_loc, n | x) = delta(n - f_count(h_loc))
                             prod_{i<n} q(z_loc_i | z_loc_<i, x) q(z_app_i | z_loc_i, x)

========  =============  =======================================================================
symbol    shape          meaning
========  =============  =======================================================================
x         (B, C, H, W)   image, C = 1 or 3, binary if p(x_d | lambda_d) is Bernoulli
n         (B,)           number of objects, 0..M
z_loc_i   (B, D)         one-hot place of the centre of object i
z_app_i   (B, L)         appearance of object i
h_loc     (B, H, W)      heights of the location map; the logits are gamma * h_loc (the paper
                         calls both h_loc; here it is what the network makes, which the
                         warm-up compares with the KL map)
gamma     scalar         in proportion to log(D) (appendix B, "Rescaling location logits")
lambda    (B, C, H, W)   mean of the image
========  =============  =======================================================================

Any site may have a particle dimension to the left of B.

Where the fast preset leaves the paper, and why:

- h_loc lies in (0, 4): both ends of the logits are pinned, as the paper assumes, so that the
  threshold of f_count means something once the warm-up is over. With gamma = log D, one peak of
  height 1 weighs as much as the whole background at 0. The threshold lies a little lower: nothing
  but being counted and drawn lifts an object's peak.
- After a draw the guide also shuts a window round the place, not that place alone: while peaks
  are wide the second draw would land on the first object again. Any guide is legitimate; the
  prior still draws uniformly without replacement, and the bound stays a bound.
- f_count has a gradient, straight-through: what the last object drawn adds to the bound (its
  log likelihood by difference, not by slope) lifts or lowers the lowest peak that was counted.
  Otherwise nothing in the bound would mind a second peak on an object, nor lift an object that
  fell below the threshold. A training probes images with one object more than was counted, at
  the next lower peak.
- Peaks are the largest of a window wider than 3 x 3: it counts better while they are wide.
- z_loc is one-hot in training too (straight-through): soft places smear sprites over objects.
- The gradient of a drawn place compares it with its neighbourhood alone; an object that is not
  worth its place, by difference, pushes that neighbourhood down. Compared with places all over the
  image, which the other objects take already, one object's peak outgrew the others', and grew a
  second peak on its slope.
  Either gradient of a place is biased. Of one object on 8 x 8 pixels, at temperature 0.5, its mean
  has a cosine of 0.96 or more with the exact gradient of the ELBO. The mean of the paper's relaxed
  places is 1.0 and 1.4 times as long as that for a background's mean of 0.2 and 0.03; straight
  through it is 1.1, 3 and 18 times as long for 0.2, 0.03 and 0.003, and with the limits that the
  fast preset's training sets 1.0, 0.7 and 0.45 times: it points the right way, and its length says
  little. Of a normal likelihood no pixel of a sprite that fits has a slope: with sigma 0.3 it is
  0.65 times as long for a place whose mass is 0.04, 0.28 times for 0.45, and turns against one of
  0.98, so that no place becomes quite sure (tests/test_gradients.py). The exact one, which can be
  had for it, made places sure before sprites lay in the middle of their windows (RUNS.md).
- At the end of a training, or before p(z_app) is fitted, the location network learns from scenes
  that the model dreams, in place of the bound (objectives/dreams.py): exact places and counts, of
  crowds too.
- q(z_app | z_loc, x) reads a crop round the place, instead of a map over the whole image that is
  then looked up at n places; the sprite decoder is fully connected. Both cost a fraction a step.
- p(z_app) is N(0, I) unless a training asks for another. Objects of a pool, as the paper's are,
  are best served by a mixture with a component or more for each of them, which is fitted to the
  guide's codes when places rest (objectives/lavae.py); ``--prior appearance=normal`` puts N(0, I)
  back in its place.

p(x_d | lambda_d) is Bernoulli, as in the paper, or for grey images a normal round lambda_d. In both
presets a Bernoulli background's mean is a small floor, not 0: one stray pixel would cost infinitely
much. Where sprites overlap, their sum is then cut off at 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_scenes import nets, priors
from pyro_scenes.distributions import USED, OneHotPlace, one_hot
from pyro_scenes.errors import UserError
from pyro_scenes.likelihoods import BernoulliImage, NormalImage, likelihood
from pyro_scenes.models.base import GREY, INK, SceneModel
from pyro_scenes.scene import Scene
from pyro_scenes.spatial import crops, find_peaks, ink_boxes, place_sprites, window_masks

# A place within the window of an earlier one is shut to the guide, yet preferred to the place
# itself: on a canvas smaller than the window there would be nowhere else to go.
NEAR = USED / 100
# How much sharper the place of a probe is than other places.
PROBE = 5.0


@dataclass(frozen=True)
class LAVAEConfig:
    """Settings of the networks and the guide; defaults are the fast preset's."""

    networks: str = "fast"  # fast or paper
    max_objects: int = 10  # M, most objects that p(n) knows
    latent: int = 32  # L, dimensions of z_app
    sprite: int = 21  # side of a sprite, pixels, odd
    crop: int = 27  # side of the crop that the appearance network reads, pixels, odd
    location_width: int = 48  # channels of the location network
    location_blocks: int = 2  # its residual blocks (fast)
    appearance_width: int = 32  # channels of the appearance network
    appearance_hidden: int = 192  # its hidden units (fast)
    sprite_width: int = 48  # channels of the sprite decoder (paper)
    sprite_hidden: tuple[int, ...] = (256, 320)  # hidden units of the sprite decoder (fast)
    logit_scale: float = 1.0  # gamma / log D; the paper's 4 is about 0.5
    count_threshold: float = 0.5  # f_count: heights above it count, in units of h_loc
    count_softness: float = 0.3  # of the threshold in f_count's gradient; 0 for no gradient
    count_gain: float = 100.0  # limit of what an object is worth to gradients, nats
    count_window: int = 9  # side of the window that a peak is the largest of, pixels, odd
    blocked_window: int = 13  # side of the window shut after a draw, pixels, odd; 1 as the paper
    straight_through: bool = True  # hard places in training
    likelihood: str = "bernoulli"  # normal or bernoulli
    sigma: float = 0.3  # of the normal likelihood
    likelihood_floor: float = 1e-5  # Bernoulli means are kept this far from 0 and 1
    appearance_prior: str = "normal"  # p(z_app): or mixture:K or flow:L, learned with the rest


PAPER = LAVAEConfig(
    networks="paper",
    appearance_width=48,
    logit_scale=0.5,
    count_threshold=4.0,
    count_softness=0.0,
    count_window=3,
    blocked_window=1,
    straight_through=False,
)
PRESETS = {"fast": LAVAEConfig(), "paper": PAPER}

# Digits are many: more hidden units. A few have two peaks within the window that a draw shuts, of
# which the second cannot be drawn; shapes may be that near to each other. Digits are not, so that
# dreams have nothing to mend.
DIGITS = {"sprite_hidden": (384, 512), "appearance_hidden": 256, "count_window": 13, "dreams": 0}
# Sprites of the paper's digits are smaller, and their places learn more slowly (appendix B).
PAPER_DIGITS = {"sprite": 17, "location_learning_rate": 1e-4}
SUITED = {
    "fast": {"multi-mnist-1k": DIGITS, "multi-mnist-10k": DIGITS, **GREY},
    "paper": {"multi-mnist-1k": PAPER_DIGITS, "multi-mnist-10k": PAPER_DIGITS, **GREY},
}


def _fast(config: LAVAEConfig, channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    c = config
    return (
        nets.SpriteMLP(c.latent, channels, c.sprite, c.sprite_hidden),
        nets.LocationNet(channels, c.location_width, c.location_blocks),
        nets.CropEncoder(channels, c.crop, c.latent, c.appearance_width, c.appearance_hidden),
    )


def _paper(config: LAVAEConfig, channels: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    c = config
    return (
        nets.PaperSprite(c.latent, channels, c.sprite, c.sprite_width),
        nets.PaperLocationNet(channels, c.location_width),
        nets.PaperAppearanceNet(channels, c.appearance_width, c.latent),
    )


NETWORKS = {"fast": _fast, "paper": _paper}


@dataclass(frozen=True)
class Encoded:
    """What the guide knows of a batch before it draws."""

    heights: Tensor  # (B, H, W), h_loc
    count: Tensor  # (B,) f_count(h_loc): long, or float with a gradient in training
    probed: Tensor | None = None  # (B,) bool: the last object is one more than f_count's


class LAVAE(SceneModel):
    """See the module's docstring.

    :ivar slots: objects that have sites at least, present or not; beyond them as many as the most
        of a batch. Pyro's Predictive, which stacks samples, needs ``config.max_objects``.
    :param image_shape: (C, H, W).
    :raises UserError: for sizes that the networks do not accept.
    """

    likelihood: BernoulliImage | NormalImage
    decoders = ("sprite_net",)
    rates = ("location", "prior", "rest")
    where_site = "z_loc"

    def __init__(self, config: LAVAEConfig, image_shape: tuple[int, int, int]):
        super().__init__()
        channels = image_shape[0]
        self.config, self.image_shape = config, image_shape
        self.temperature: float | None = None  # of the places' gradient; a training sets it
        self.slope: float | None = None  # limits that gradient, see place_sprites; likewise
        self.reach: int | None = None  # of that gradient round a place, pixels; likewise
        # Where batch normalisation reads the batches of several processes, the networks of objects
        # run in all of them, or none. Likewise.
        self.slots = 0
        for name in ("sprite", "crop", "count_window", "blocked_window"):
            if getattr(config, name) % 2 == 0:
                raise UserError(f"{name} must be odd, so that it has a centre pixel")
        # generative model: p(n), p(z_loc), p(z_app), p(x | lambda)
        self.count_prior: nn.Module = priors.LearnedCount(config.max_objects)
        self.location_prior: nn.Module = priors.UniformPlaces()
        self.appearance_prior = priors.make("appearance", config.appearance_prior, config.latent)
        self.likelihood = likelihood(config.likelihood, config.sigma, config.likelihood_floor)
        # f_sprite; then inference networks: h_loc, and the parameters of q(z_app | z_loc, x)
        if config.networks not in NETWORKS:
            raise UserError(f"networks must be one of {', '.join(NETWORKS)}")
        if config.networks == "paper" and config.sprite_width <= config.latent:
            raise UserError("sprite_width must be more than latent: z_app takes that many channels")
        build = NETWORKS[config.networks]
        self.sprite_net, self.location_net, self.appearance_net = build(config, channels)
        self.check(torch.zeros(1, *image_shape))

    # --- the generative model ---------------------------------------------------------------

    @pyro_method
    def model(self, x: Tensor) -> None:
        """:param x: (B, C, H, W) in [0, 1]; sites n, z_loc_i, z_app_i, x."""
        size = x.shape[-2:]
        with pyro.plate("images", len(x), dim=-1):
            n = pyro.sample("n", self.count_prior())  # (B,)
            used = x.new_zeros(*n.shape, size[0] * size[1])  # (B, D)
            appearance_prior = self.appearance_prior()  # once: a large mixture is prepared
            places, appearances = [], []
            steps = max(int(n.max()), self.slots)
            for i in pyro.markov(range(steps), history=max(steps, 1)):
                with _if_present(i, n):
                    z_loc = pyro.sample(f"z_loc_{i}", self.location_prior(used))  # (B, D)
                    z_app = pyro.sample(f"z_app_{i}", appearance_prior)  # (B, L)
                if i + 1 < steps:
                    # The place it took, of a relaxed one too: USED times its tails would swamp all.
                    used = used + one_hot(z_loc.detach().argmax(-1), used.shape[-1], used.dtype)
                places.append(z_loc)
                appearances.append(z_app)
            if not places:
                pyro.sample("x", self.likelihood(torch.zeros(*n.shape, *x.shape[1:]).to(x)), obs=x)
                return
            # Sprites are decoded for objects that are there.
            present, row, slot = _present(n, steps)
            where, what = _listed(present, places), _listed(present, appearances)  # (P, D), (P, L)
            sprites = self.sprite_net(what)  # (P, C, S, S)
            shape = n.numel(), *size
            canvas = place_sprites(sprites, where, row, shape, self.slope, self.reach)
            mean = canvas.view(*n.shape, *x.shape[1:])  # lambda of eq. 4
            pyro.sample("x", self.likelihood(mean), obs=x)
            slopes = self._slopes(x, n, canvas, sprites, where, row, slot)
            if slopes is not None:
                pyro.factor("slopes", slopes)

    def _slopes(
        self, x: Tensor, n: Tensor, mean: Tensor, sprites: Tensor, z_loc: Tensor, row: Tensor,
        slot: Tensor,
    ) -> Tensor | None:
        """Zeros like n, with the slopes that n and places get from what objects are worth.

        An object is worth the log likelihood with it less that without it, by difference. The
        last one's is the slope of n. One that is not worth its place, log D nats, slopes against
        its neighbourhood; to those that are, all objects of an image are alike.
        """
        placed = self.reach is not None and z_loc.requires_grad
        if not n.requires_grad and not placed:
            return None
        gain = self._gain(x, mean, sprites, z_loc, row)
        slopes = gain.new_zeros(n.numel())
        if n.requires_grad:
            last = slot == n.flatten()[row] - 1
            zero = (n - n.detach()).flatten()[row[last]]
            slopes = slopes.index_add(0, row[last], zero * gain[last])
        if placed:
            assert self.reach is not None
            size = x.shape[-2], x.shape[-1]
            near = window_masks(z_loc.argmax(-1), 2 * self.reach + 1, size)  # (P, D)
            mass = (z_loc * near).sum(-1)
            lost = (gain - math.log(z_loc.shape[-1])).clamp(max=0.0)
            slopes = slopes.index_add(0, row, (mass - mass.detach()) * lost)
        return slopes.view(n.shape)

    @torch.no_grad()
    def _gain(self, x: Tensor, mean: Tensor, sprite: Tensor, z_loc: Tensor, row: Tensor) -> Tensor:
        """What each object is worth, (P,), nats, limited by ``count_gain`` on both sides.

        :param x: (B, C, H, W). :param mean: (R, C, H, W) of all rows, with the objects.
        :param sprite: (P, C, S, S). :param z_loc: (P, D) one-hot. :param row: (P,) long, of R.
        """
        place, side = z_loc.argmax(-1), sprite.shape[-1]
        seen = crops(x, place, side, row % len(x))  # (P, C, S, S), as the following
        painted = crops(mean, place, side, row)
        # Beyond the canvas nothing was painted, nor seen: both means are 0 there.
        without = (painted - sprite).clamp(min=0.0)
        gain = self.likelihood(painted).log_prob(seen) - self.likelihood(without).log_prob(seen)
        return gain.clamp(-self.config.count_gain, self.config.count_gain)

    # --- the guide --------------------------------------------------------------------------

    def encode(self, x: Tensor, probed: Tensor | None = None) -> Encoded:
        """h_loc and f_count(h_loc) (eq. 7), once for all particles.

        :param probed: (B,) bool, images to draw one object more in than counted, in a training.
        """
        self.check(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            heights = self.location_net(x)  # (B, H, W)
        config = self.config
        peaks = find_peaks(heights.detach(), 0.0, config.count_window)
        count = (peaks & (heights > config.count_threshold)).sum((-2, -1))  # (B,)
        count = count if probed is None else count + probed
        if self.temperature is None or config.count_softness == 0 or not heights.requires_grad:
            return Encoded(heights, count, probed)
        # Straight-through: the slope of f_count lies in the lowest peak that is drawn.
        candidates = heights.masked_fill(~peaks, -math.inf).flatten(1)
        highest = candidates.topk(min(config.max_objects, candidates.shape[1])).values
        lowest = highest.gather(1, (count - 1).clamp(0, highest.shape[1] - 1)[:, None]).squeeze(1)
        soft = ((lowest - config.count_threshold) / config.count_softness).sigmoid()
        soft = torch.where(count > 0, soft, 0.0)
        return Encoded(heights, count + (soft - soft.detach()), probed)

    @pyro_method
    def guide(self, x: Tensor, encoded: Encoded | None = None) -> None:
        """:param encoded: of x, if it is at hand already or if counts are to be forced."""
        encoded = encoded or self.encode(x)
        with pyro.plate("images", len(x), dim=-1):
            # The prior gives no mass to more than M objects, or to what one that is swapped in
            # goes to: the bound is then one for so many of them.
            most = max(self.config.max_objects, self.count_prior().logits.shape[-1] - 1)
            count = encoded.count.clamp(max=most)
            n = pyro.sample("n", dist.Delta(count))  # (B,)
            logits = self._logits(encoded)  # (B, D)
            places: list[Tensor] = []
            steps = max(int(n.max()), self.slots)
            for i in pyro.markov(range(steps), history=max(steps, 1)):
                here = logits
                if encoded.probed is not None:
                    # The next lower peak, which all of the background would outweigh.
                    last = encoded.probed & (i == n.detach() - 1)
                    here = torch.where(last[:, None], PROBE * logits, logits)
                with _if_present(i, n):
                    site = OneHotPlace(here, self.temperature, self.config.straight_through)
                    z_loc = pyro.sample(f"z_loc_{i}", site)  # (B, D)
                if i + 1 < steps:
                    logits = self._shut(logits, z_loc, x.shape[-1])
                places.append(z_loc)
            for i, (mean, scale) in enumerate(self._appearance(x, n, places)):
                with _if_present(i, n):
                    pyro.sample(f"z_app_{i}", dist.Normal(mean, scale).to_event(1))  # (B, L)

    def _logits(self, encoded: Encoded) -> Tensor:
        heights = encoded.heights.flatten(1)
        return self.config.logit_scale * math.log(heights.shape[-1]) * heights

    def _shut(self, logits: Tensor, z_loc: Tensor, width: int) -> Tensor:
        """Shut a drawn place (eq. 11) and its window to further draws."""
        place = z_loc.detach().argmax(-1, keepdim=True)
        size = z_loc.shape[-1] // width, width
        near = window_masks(place.squeeze(-1), self.config.blocked_window, size)
        shut = (NEAR * near).scatter_add_(-1, place, near.new_full(place.shape, USED))
        return logits + shut

    def _appearance(self, x: Tensor, n: Tensor, places: list) -> list[tuple[Tensor, Tensor]]:
        """Mean and standard deviation of q(z_app_i | z_loc_i, x), each (..., L), for every slot.

        The network runs once for each (image, place) that occurs; absent slots get N(0, I).
        """
        if not places:
            return []
        present, row, _ = _present(n, len(places))
        z_loc = _listed(present, places)  # (P, D)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            mean, log_variance = self.appearance_net(x, z_loc, row % len(x))  # (P, L) each
        shape = *present.shape, self.config.latent
        means = mean.new_zeros(shape).masked_scatter(present.unsqueeze(-1), mean)
        # Bounded: one crop unlike all others must not overflow the exponential.
        scale = (0.5 * log_variance.clamp(-14.0, 4.0)).exp()
        scales = mean.new_ones(shape).masked_scatter(present.unsqueeze(-1), scale)
        return list(zip(means.unbind(-2), scales.unbind(-2), strict=True))

    # --- scenes -----------------------------------------------------------------------------

    def counts(self, trace: poutine.Trace) -> Tensor:
        return trace.nodes["n"]["value"].long()

    def numbers(self, site: str, value: Tensor) -> Tensor:
        """The place as its column and row."""
        if site != self.where_site:
            return value
        place, width = value.argmax(-1), self.image_shape[2]
        return torch.stack([place % width, place // width], -1).to(value)

    @torch.no_grad()
    def infer(self, x: Tensor, limit: float | None = None) -> Scene:
        """The inferred count, its places from the likeliest on, and the means of z_app."""
        self.check_values(x)
        encoded = self.encode(x)
        n, logits = encoded.count, self._logits(encoded)
        self.within(n, self.config.max_objects if limit is None else limit)
        places = []
        for _ in range(int(n.max()) if len(n) else 0):
            places.append(one_hot(logits.argmax(-1), logits.shape[-1], logits.dtype))
            logits = self._shut(logits, places[-1], x.shape[-1])
        slots = len(places)
        present = torch.arange(slots, device=x.device) < n[:, None]  # (B, M)
        index = torch.stack([z.argmax(-1) for z in places], 1) if places else n.new_zeros(len(n), 0)
        width = x.shape[-1]
        where = torch.stack([index % width, index // width], -1) + 0.5  # (B, M, 2)
        where = where.masked_fill(~present[..., None], float("nan"))
        means = [mean for mean, _ in self._appearance(x, n, places)]
        what = torch.stack(means, 1) if means else x.new_zeros(len(x), 0, self.config.latent)
        size = x.shape[-2], x.shape[-1]
        scene = Scene(present, where, where.new_zeros(len(x), slots, 4), what=what, size=size)
        return replace(scene, boxes=self.boxes(scene))

    def sprites(self, scene: Scene) -> Tensor:
        if scene.what is None or scene.what.shape[-1] != self.config.latent:
            raise UserError(
                f"the scene's appearances are not {self.config.latent} numbers: another model's?"
            )
        side, channels = self.config.sprite, self.image_shape[0]
        sprites = scene.what.new_zeros(*scene.present.shape, channels, side, side)
        if scene.present.any():
            sprites[scene.present] = self.sprite_net(scene.what[scene.present])
        return sprites

    def boxes(self, scene: Scene) -> Tensor:
        """The box of each sprite's ink, of binary images its pixels above one half.

        :return: pixels, (B, M, 4); NaN where absent.
        """
        drawn = self.sprites(scene).amax(2)  # (B, M, S, S)
        ink = self.ink(drawn, 0.5 if self.likelihood.binary else INK)
        ink = ink | ~ink.flatten(2).any(-1)[..., None, None]  # a faint sprite gets its window
        boxes = ink_boxes(ink)
        centre = scene.where + boxes[..., :2] - ink.shape[-1] / 2
        boxes = torch.cat([centre, boxes[..., 2:]], -1)
        return boxes.masked_fill(~scene.present[..., None], float("nan"))

    def layers(self, scene: Scene) -> Tensor:
        height, width = scene.size or self.image_shape[1:]
        half = self.config.sprite // 2  # of a sprite: so far beyond the canvas it is seen in part
        where = scene.where[scene.present].floor() + half  # (P, 2)
        wide = width + 2 * half, height + 2 * half
        near = ((where >= 0) & (where < where.new_tensor(wide))).all(-1)  # (P,)
        column, line = where[near].long().unbind(-1)  # (Q,)
        sprites = self.sprites(scene)[scene.present]
        layers = sprites.new_zeros(len(where), sprites.shape[1], height, width)
        layers[near] = place_sprites(
            sprites[near], one_hot(line * wide[0] + column, wide[0] * wide[1]),
            torch.arange(len(line), device=where.device), (len(line), wide[1], wide[0]),
        )[..., half : half + height, half : half + width]
        result = layers.new_zeros(*scene.present.shape, *layers.shape[1:])
        result[scene.present] = layers
        return result

    # --- for training -----------------------------------------------------------------------

    def group(self, part: str) -> str:
        # A learned p(z_app) is of the rest: it learns as fast as what it is the prior of.
        return {"location_net": "location", "count_prior": "prior"}.get(part, "rest")

    def renew(self) -> None:
        """New networks of appearance."""
        sprite, _, appearance = NETWORKS[self.config.networks](self.config, self.image_shape[0])
        self.sprite_net.load_state_dict(sprite.state_dict())
        self.appearance_net.load_state_dict(appearance.state_dict())

    def check(self, x: Tensor) -> None:
        stride = int(self.location_net.stride)  # type: ignore[arg-type]
        super().check(x)
        self.check_sides(x, stride)


def _present(n: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which slots hold an object, (..., M) bool, and the row (of all but M) and slot of each."""
    present = torch.arange(slots, device=n.device) < n[..., None]
    row, slot = present.reshape(-1, slots).nonzero(as_tuple=True)
    return present, row, slot


def _listed(present: Tensor, values: list[Tensor]) -> Tensor:
    """What the slots hold, M of (..., K), for the objects that are present: (P, K)."""
    shape = *present.shape[:-1], -1
    return torch.stack([value.expand(shape) for value in values], -2)[present]


def _presence(i: Tensor | int, n: Tensor) -> Tensor:
    """1 for the objects i < n, with a gradient for n in the last of them."""
    return (n - i).clamp(0.0, 1.0)


@contextmanager
def _if_present(i: int, n: Tensor) -> Iterator[None]:
    """Sites of object i count where i < n, in model and guide alike."""
    scale = _presence(i, n).masked_fill(i >= n, 1.0)  # Pyro refuses a scale of 0
    with poutine.mask(mask=i < n), poutine.scale(scale=scale):
        yield
