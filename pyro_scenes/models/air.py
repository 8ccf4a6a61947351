"""AIR: attend, infer, repeat (Eslami et al., 2016; appendix A of the Discrete-AIR paper).

The joint density, for T steps; object t is there while all z_pres up to t are 1, and the sites of
objects that are not count nothing::

    p(x, z) = prod_t p(z_pres_t) p(z_where_t) p(z_what_t)  p(x | C_T)              (eq. 4 and 5)
    C_t = C_{t-1} + z_pres_1 ... z_pres_t ST(f_dec(z_what_t), z_where_t)

and the guide (eq. 3)::

    q(z | x) = prod_t q(z_pres_t, z_where_t | h_t) q(z_what_t | ST(x - C_{t-1}, z_where_t))

=========  =================  ================================================================
symbol     shape              meaning
=========  =================  ================================================================
x          (B, C, H, W)       image
z_pres_t   (B,)               0 or 1, in training too
z_where_t  (B, 3)             of scale, translation x, y, which `AIR.pose` makes of its numbers,
                              N(0, I) each: a scale is log-normal
z_what_t   (B, L)             appearance
C_t        (B, C, H, W)       canvas after t objects
h_t        (B, h)             state of the LSTM
=========  =================  ================================================================

Any site may have a particle dimension to the left of B. The prior over z_pres is that of a count:
geometric unless swapped.

z_pres is trained by its score. The baseline of each step is what the image would have if no
further object were drawn, log p(x | C_{t-1}), which depends on earlier steps alone,
plus a network's correction, trained at a rate of its own: the score of z_pres_t is then weighted
by what object t and those after it gain. No gradient passes through C_t into what the guide draws
later: of two objects or more that of the continuous sites lacks this term.

Where the fast preset leaves the paper's guide, and why: the LSTM reads a glimpse of x - C_{t-1}
round the place with most unexplained ink, and z_where is relative to it, where the paper's reads x
as a flat vector; an object far from the place that is looked at gives its position no gradient.

With `contrast` ST is sharpened by a learned exponent (`nets.Contrast`), where the paper has none: a
window that is drawn at another size has no edges as sharp as those of binary images.

In both presets the scale's prior is of about the size of the data's objects, where the paper says
of its normal neither mean nor size; and a window is read from what is left of x, so that objects
which touch are told apart, where AIR reads it from x.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_scenes import attention, nets
from pyro_scenes.affine import read, write
from pyro_scenes.errors import UserError
from pyro_scenes.likelihoods import likelihood
from pyro_scenes.models.attend import Attend, Choose, Pose
from pyro_scenes.priors import GeometricCount, StandardNormal, presence_logits

LOGIT = 12.0  # of z_pres, kept this near to 0: scores of sure draws would be infinite
SMALLEST, LARGEST = 0.02, 2.0  # of half the image's side, the scale's range


@dataclass(frozen=True)
class AIRConfig:
    """Settings of the model and the guide; defaults are the fast preset's for Multi-Sprites."""

    networks: str = "fast"  # fast or paper
    max_objects: int = 3  # T, most objects in an image
    latent: int = 50  # L, dimensions of z_what
    scale_mean: float = 0.25  # of half the image's side, the prior's median
    scale_deviation: float = 0.3  # of its logarithm
    place_deviation: float = 0.5  # of half the image's side
    likelihood: str = "normal"  # normal or bernoulli
    sigma: float = 0.3  # of the normal likelihood
    likelihood_floor: float = 1e-5  # Bernoulli means are kept this far from 0 and 1
    more: float = 0.5  # geometric prior: probability of one more object
    window: int = 24  # side of an object, pixels
    decoder_hidden: tuple[int, ...] = (256, 256)  # units of f_dec
    encoder_hidden: tuple[int, ...] = (256,)  # units of the window's encoder
    hidden: int = 128  # units of the LSTM
    glimpse: int = 28  # side of what it reads, pixels (fast)
    glimpse_width: int = 16  # channels (fast)
    blur: float = 3.0  # see attention.InkPeak, pixels (fast)
    shut: float = 5.0  # of objects found before, see there, pixels (fast)
    contrast: bool = False  # whether what is drawn gets as sharp edges as are learned


PAPER = AIRConfig(networks="paper", hidden=256, decoder_hidden=(200,), encoder_hidden=(200,))
PRESETS = {"fast": AIRConfig(), "paper": PAPER}
DIGITS = {"max_objects": 2, "scale_mean": 0.4, "window": 28}
BINARY = {"likelihood": "bernoulli", "steps": 6000}
SUITED = {
    "fast": {
        # Digits are of nearly one size: a prior that says so keeps strokes from being objects.
        "multi-mnist": DIGITS | {"scale_deviation": 0.1, "steps": 2500},
        "multi-mnist-1k": BINARY,
        "multi-mnist-10k": BINARY,
        "multi-dsprites": BINARY | {"contrast": True},
    },
    "paper": {
        "multi-mnist": DIGITS | {"steps": 328_125},  # 420 epochs of 50,000 images
        **dict.fromkeys(
            ("multi-mnist-1k", "multi-mnist-10k", "multi-dsprites"), {"likelihood": "bernoulli"}
        ),
    },
}


class AIR(Attend):
    """See the module's docstring.

    :param image_shape: (C, H, W).
    :raises UserError: for networks or a likelihood of another name.
    """

    across = 1
    rates = ("model", "guide", "baseline")

    def __init__(self, config: AIRConfig, image_shape: tuple[int, int, int]):
        super().__init__()
        c, channels = config, image_shape[0]
        self.config, self.image_shape = config, image_shape
        self.most = self.steps = c.max_objects
        if c.networks not in ("fast", "paper"):
            raise UserError("networks must be fast or paper")
        # generative model: p(n) for z_pres, p(z_where), p(z_what), p(x | C_T) and f_dec
        self.count_prior: nn.Module = GeometricCount(c.more, c.max_objects)
        self.where_prior: nn.Module = StandardNormal(3)
        self.appearance_prior: nn.Module = StandardNormal(c.latent)
        self.likelihood = likelihood(c.likelihood, c.sigma, c.likelihood_floor)
        self.decoder = nets.SpriteMLP(c.latent, channels, c.window, c.decoder_hidden)
        self.contrast = nets.Contrast() if c.contrast else nn.Identity()
        # inference networks: the LSTM, then the parameters of each site
        pixels = channels * image_shape[1] * image_shape[2]
        self.latents = 1 + 3 + c.latent
        self.peak = attention.InkPeak(c.blur, c.shut) if c.networks == "fast" else None
        features = pixels if self.peak is None else 128
        self.look: nn.Module = nn.Flatten()
        if self.peak is not None:
            self.look = nets.WindowEncoder(channels, c.glimpse, c.glimpse_width, features)
        self.rnn = nets.LookingCell(features + self.latents, c.hidden)
        seen = c.hidden if self.peak is None else c.hidden + features
        self.presence_head = nn.Linear(seen, 1)
        self.where_head = nn.Linear(seen, 6)
        self.encoder = nets.mlp(channels * c.window**2, c.encoder_hidden, 2 * c.latent)
        self.baseline = nets.mlp(seen + 1, (64,), 1)  # of z_pres, in hundreds of nats
        with torch.no_grad():
            self.presence_head.bias.fill_(1.0)  # objects are drawn before they look like any
            self.where_head.weight.mul_(0.1)
            self.where_head.bias.zero_()

    # --- the generative model ---------------------------------------------------------------

    @pyro_method
    def model(self, x: Tensor) -> None:
        """:param x: (B, C, H, W) in [0, 1]; sites z_pres_t, z_where_t, z_what_t and x."""
        more = presence_logits(self.count_prior(), self.steps)  # (T, 2)
        with pyro.plate("images", len(x), dim=-1):
            here = x.new_ones(len(x))
            objects = []
            for t in pyro.markov(range(self.steps), history=self.steps):
                with poutine.mask(mask=here > 0):
                    logit = more[t, 1] - more[t, 0]
                    z_pres = pyro.sample(f"z_pres_{t}", dist.Bernoulli(logits=logit))  # (B,)
                here = here * z_pres
                with poutine.mask(mask=here > 0):
                    z_where = pyro.sample(f"z_where_{t}", self.where_prior())  # (B, 3)
                    z_what = pyro.sample(f"z_what_{t}", self.appearance_prior())  # (B, L)
                objects.append({"here": here, "z_where": z_where, "z_what": z_what})
            canvas = self._drawn(objects, (x.shape[-2], x.shape[-1]))
            pyro.sample("x", self.likelihood(canvas), obs=x)

    def pose(self, z_where: Tensor) -> Pose:
        c = self.config
        # Clamped before, too: the gradient of a clamped infinity is NaN.
        scale = c.scale_mean * torch.exp((c.scale_deviation * z_where[..., :1]).clamp(max=20.0))
        scale = scale.clamp(SMALLEST, LARGEST).expand_as(z_where[..., :2])
        angle, shear = torch.zeros_like(z_where[..., 0]), torch.zeros_like(scale)
        return scale, angle, shear, c.place_deviation * z_where[..., 1:]

    def templates(self, kind: Tensor | None, what: Tensor | None) -> Tensor:
        return self.decoder(what)

    def write(self, templates: Tensor, z_where: Tensor, size: tuple[int, int]) -> Tensor:
        scale, _, _, translation = self.pose(z_where.flatten(0, -2))
        drawn = self.contrast(write(templates, scale, translation, size))
        return drawn.view(*z_where.shape[:-1], *drawn.shape[1:])

    # --- the guide --------------------------------------------------------------------------

    def _attend(self, x: Tensor, choose: Choose) -> list[dict[str, Tensor]]:
        c = self.config
        rows, lead, side = len(x), torch.Size((len(x),)), c.window
        here, canvas = x.new_ones(rows), torch.zeros_like(x)
        previous, state = x.new_zeros(rows, self.latents), None
        look, step = self.rnn.opened(self.rnn.input_size - self.latents)
        centres: list[Tensor] = []
        steps = []
        for t in pyro.markov(range(self.steps), history=self.steps):
            left = x.repeat(len(canvas) // rows, 1, 1, 1) - canvas  # to explain, (N, C, H, W)
            if self.peak is None:
                centre = torch.zeros_like(canvas[:, 0, 0, :2])
                if t == 0:  # the same at every step
                    looked = look(self.look(x))
            else:
                centre = self.peak(left, centres)
                seen = self.look(attention.glimpse(left, centre, c.glimpse))
                looked = look(seen)
            state = step(looked, previous, state)
            h = state[0] if self.peak is None else torch.cat([state[0], seen], -1)
            logit = self.presence_head(h).squeeze(-1).clamp(-LOGIT, LOGIT).view(lead)
            site = dist.Bernoulli(logits=logit)
            with self._baseline(h, left, canvas, lead) as shape:
                z_pres = choose(f"z_pres_{t}", site, here)
                shape.append(z_pres.shape)
            here = here * z_pres
            mean, spread = self.where_head(h).chunk(2, -1)
            if self.peak is not None:
                # Relative to the glimpse's centre, and by short steps: the object is near.
                mean = mean * mean.new_tensor([1.0, 0.2, 0.2])
                mean = mean + F.pad(centre / c.place_deviation, (1, 0))
            if here.shape != lead:  # particles came with the first draw
                times, lead = here.numel() // lead.numel(), here.shape
                left, canvas = (v.repeat(times, 1, 1, 1) for v in (left, canvas))
                mean, spread, looked = (v.repeat(times, 1) for v in (mean, spread, looked))
                state = (state[0].repeat(times, 1), state[1].repeat(times, 1))
            scale = 0.1 * F.softplus(spread - 1.0) + 1e-3
            site = dist.Normal(mean.view(*lead, -1), scale.view(*lead, -1)).to_event(1)
            z_where = choose(f"z_where_{t}", site, here)
            scale, _, _, centre = self.pose(z_where.flatten(0, -2))
            window = read(left, scale, centre, (side, side))
            mean, spread = self.encoder(window.flatten(1)).view(*lead, -1).chunk(2, -1)
            site = dist.Normal(mean, F.softplus(spread - 1.0) + 1e-3).to_event(1)
            z_what = choose(f"z_what_{t}", site, here)
            steps.append({"here": here, "z_where": z_where, "z_what": z_what})
            previous = torch.cat([z_pres.unsqueeze(-1), z_where, z_what], -1).flatten(0, -2)
            if t + 1 < self.steps:
                with torch.no_grad():
                    drawn = self._drawn(steps[-1:], (x.shape[-2], x.shape[-1]))
                    canvas = canvas + drawn.flatten(0, -4)
                    centres.append(self.pose(z_where.flatten(0, -2))[3])
        return steps

    @contextmanager
    def _baseline(
        self, h: Tensor, left: Tensor, canvas: Tensor, lead: torch.Size
    ) -> Iterator[list[torch.Size]]:
        """Give the Bernoulli site inside its baseline, for TraceGraph_ELBO: what is to come, nats.

        A site's downstream cost is a log density: the gain of the image is to be expected. Yields a
        list for the shape of what is drawn: particles come with the first draw.

        :param h: (N, h). :param left: (N, C, H, W), of the image. :param canvas: of its shape.
        """
        shape: list[torch.Size] = []
        if not torch.is_grad_enabled():  # nothing learns, so no one reads it
            yield shape
            return
        black = torch.zeros_like(canvas[:1])
        most = self.likelihood(black).log_prob(black)  # (1,), of an image that the canvas explains
        nothing_more = self.likelihood(canvas).log_prob(left + canvas) - most  # (N,)
        features = torch.cat([h.detach(), nothing_more.unsqueeze(-1) / 100], -1)
        network = self.baseline  # read here, in the guide, where Pyro sees which parameters it has

        def baseline(features: Tensor) -> Tensor:
            rest = 100 * network(features).squeeze(-1)
            value = (most + 100 * features[..., -1] + rest).view(lead).expand(shape[0])
            while value.dim() and len(value) == 1:  # as of a single image Pyro's costs
                value = value.squeeze(0)
            return value

        with poutine.infer_config(config_fn=lambda site: {
            "baseline": {"nn_baseline": baseline, "nn_baseline_input": features}
        }):
            yield shape

    def choose_likeliest(self, name: str, site, here: Tensor) -> Tensor:
        return (site.probs > 0.5).float() if name.startswith("z_pres") else site.mean

    def group(self, part: str) -> str:
        return part if part == "baseline" else super().group(part)
