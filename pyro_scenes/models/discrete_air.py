"""Discrete-AIR: categories, attributes, affine places, presence.

Wang, Jamnik and Lio, "Unsupervised extraction of interpretable graph representations from
multiple-object scenes" (2019); sections, equations and appendices are that paper's.

The joint density, for T steps; object t is there while all z_pres up to t are 1, and the sites of
objects that are not count nothing::

    p(x, z) = prod_t p(z_pres_t) p(z_cat_t) p(z_where_t) p(z_attr_t)  p(x | C_T)
    C_t = C_{t-1} + z_pres_1 ... z_pres_t ST(f(z_cat_t, z_attr_t), T^d(z_where_t))
    f = decoder(f_t(z_cat) + f_a(z_attr)), or their product          (section 2.1)
        or, with ``combine=deform``, decoder(f_t(z_cat)) bent by f_a(z_attr)

and the guide, which looks at what is left to explain (section 2.2)::

    paper   q(z | x) = prod_t q(z_pres_t, z_where_t | x - C_{t-1}, z_<t)
                              q(z_cat_t, z_attr_t | ST(x, T^e(z_where_t)))
    fast    q(z | x) = prod_t q(z_pres_t, z_cat_t | x - C_{t-1}, h_t)
                              q(z_where_t, z_attr_t | z_cat_t, x - C_{t-1}, h_t)

=========  =================  ================================================================
symbol     shape              meaning
=========  =================  ================================================================
x          (B, C, H, W)       image
z_pres_t   (B, 2)             one-hot: absent, present; relaxed in training (eq. 7, with the
                              logistic noise that a softmax of two is)
z_cat_t    (B, K)             one-hot category; relaxed in the paper's training (eq. 6)
z_where_t  (B, D)             of scale x, y, angle, translation x, y, and shear x, y if D = 7,
                              which `DiscreteAIR.pose` makes of its numbers, N(0, I) each
z_attr_t   (B, A)             attributes
C_t        (B, C, H, W)       canvas after t objects
h_t        (B, h)             state of the LSTM, which reads x - C_{t-1} and z_{t-1}
=========  =================  ================================================================

Any site may have a particle dimension to the left of B. T^d and T^e are those of affine.py. The
paper's prior over z_where is a normal too (C.2), and it does not say of what mean and size; in both
presets here the scale lies between two limits, which suit the data, and angle, translation and
shear are the numbers times a constant. The
prior over z_pres is that of a count: geometric unless swapped.

In training z_pres is relaxed, and the ELBO of relaxed objects has another gradient than the exact
one. Of up to two objects on 8 x 8 pixels, the mean for the logits of z_pres has a cosine of 0.98 or
more with the exact gradient, and 0.95 and 0.87 times its length at temperature 0.5 (fast, paper),
0.80 and 0.69 times at 1. Of an image without objects alone it minds a superfluous one less than it
should, or not at all (tests/test_gradients.py). No gradient passes through C_t into what the guide
draws later: of two objects or more that of the continuous sites lacks this term.

Where the fast preset leaves the paper, and why. The model is the paper's but for its decoder, which
is fully connected, for narrower limits of the scale, one scale of both sides where shapes have one
size, and for the first two of:

- With `combine=deform`, attributes bend a template smoothly and make it bold or thin, in the same
  way whatever its category (`nets.Deformation`), where the paper's make another picture of it. A
  sum of codes turns a 3 into an 8, and one category serves both, unless it is of one number that
  tells little; a shape that is bent stays that shape, whatever the numbers.
- With `contrast`, what is written on the canvas is sharpened by a learned exponent
  (`nets.Contrast`): a template that is turned and drawn at another size has no edges as sharp as
  those of binary images.
- It looks before it regresses: the LSTM reads a glimpse round the place with most unexplained
  ink, and z_where is relative to it. Regressing a position from a flat picture is the slow part.
- It asks the model for the category: each category's template, at the pose and attributes that
  the network gives for it, is compared with the picture, and q(z_cat) is the softmax of what each
  would add to the likelihood. Encoder and templates then never disagree on what a category
  is, and a category is a cluster of what looks alike up to pose and attributes. Its logits have no
  gradient and need none, so z_cat is drawn exactly in training too: relaxed draws blend templates.
- q(z_pres) starts from the same evidence: what the best category would add, in nats. Drawing what
  is not there would teach a template to look like the background.
- With `straight_through`, a z_pres of 1 or 0 has the gradient of the relaxed one. A relaxed object
  is drawn in part, and half an object takes three quarters off the squares for half the price, so
  that strokes which are left of another become objects. Of a normal likelihood the gradients at 0
  and at 1 are in the mean what the object is worth.
- With `looks`, pose and attributes of each category are corrected by another picture: the object
  stood upright in a window, by the pose that all categories share. The next look corrects this
  pose first.
- With `rounds`, an evaluation looks at each object but the last with the next one taken away, and
  at that one with the first taken away, in turn: once as if the first had been found, and twice as
  if it were one half of the ink. What a category would add is then counted among the pixels that
  it is drawn on, not in the window. Training does without: a look costs as much as an object.
- With `angles`, the angle is searched for, not regressed: a square looks the same at four angles,
  a triangle at three, and no continuous function of the picture gives one of them.
- Its training asks for categories, where the paper's leaves them to the ELBO: those that are hardly
  used are given nats in q(z_cat), or begin again as twins of others, and templates explain the
  images alone before there are attributes (objectives/air.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_scenes import attention, nets
from pyro_scenes.affine import to_image, warp, windows
from pyro_scenes.distributions import one_hot
from pyro_scenes.errors import UserError
from pyro_scenes.likelihoods import likelihood
from pyro_scenes.models.attend import Attend, Choose, Pose, counted
from pyro_scenes.priors import GeometricCount, StandardNormal, UniformCategory, presence_logits

LIMIT = 50.0  # of how far apart the logits of a relaxed site are, in units of its temperature
APART = 0.05  # of a code's standard deviation, how far the twins of a category are from it
WORTH = 80.0  # nats that two objects must explain more than one, to be looked at apart
SURE = 8.0  # limit of what evidence adds to the logit of z_pres
ANGLE, PLACE = 2, slice(3, 5)  # the angle's and the translation's columns of z_where
SPREAD = 0.5  # standard deviation of the translation's prior, of half the image's side
State = tuple[Tensor, Tensor]  # of the LSTM, (N, h) each


@dataclass(frozen=True)
class DiscreteAIRConfig:
    """Settings of the model and the guide; defaults are the fast preset's for Multi-Sprites."""

    networks: str = "fast"  # fast or paper
    max_objects: int = 3  # T, most objects in an image
    classes: int = 3  # K, categories
    attributes: int = 0  # A, dimensions of z_attr
    attribute_least: float = 1e-3  # standard deviation of q(z_attr), at least
    combine: str = "add"  # f_t and f_a: add or multiply, or deform what f_t alone gives
    shear: bool = False  # whether z_where has two numbers for it
    isotropic: bool = True  # one scale for both sides
    scale_least: float = 0.08  # of half the image's side, of isotropic ones the sides' mean
    scale_most: float = 0.5  # likewise
    angle_deviation: float = 2.0  # of the prior, radians
    likelihood: str = "normal"  # normal or bernoulli
    sigma: float = 0.3  # of the normal likelihood, and of what guides take an image to gain by
    likelihood_floor: float = 1e-5  # Bernoulli means are kept this far from 0 and 1
    more: float = 0.5  # geometric prior: probability of one more object
    window: int = 24  # side of a template, pixels; 32 with the paper's networks
    code: int = 256  # units of f_t and f_a
    decoder_hidden: tuple[int, ...] = (256,)  # units of the decoder (fast)
    hidden: int = 128  # units of the LSTM
    embedding: bool = True  # whether what it reads goes through convolutions first (paper)
    glimpse: int = 28  # side of what it reads, pixels (fast)
    glimpse_width: int = 16  # channels (fast)
    straight_through: bool = False  # relaxed draws are made one-hot, and keep their gradients
    rounds: int = 0  # of looks at an object without the next, and the reverse, to evaluate (fast)
    looks: int = 0  # at the object stood upright (fast)
    blur: float = 3.0  # see attention.InkPeak, pixels (fast)
    shut: float = 5.0  # of objects found before, see there, pixels (fast)
    sure: float = 10.0  # nats that an object must add for one more in the logit of z_pres (fast)
    angles: int = 36  # tried for each template; 0 to regress them (fast)
    contrast: bool = False  # whether what is drawn gets as sharp edges as are learned


PAPER = DiscreteAIRConfig(
    networks="paper", isotropic=False, window=32, code=128, hidden=256, angles=0
)
PRESETS = {"fast": DiscreteAIRConfig(), "paper": PAPER}
# What differs by data set, in each preset; settings of the training too.
DIGITS = {
    "max_objects": 2, "classes": 10, "attributes": 1, "shear": True, "isotropic": False,
    "scale_least": 0.1, "scale_most": 0.8, "angle_deviation": 0.3, "angles": 0, "window": 28,
}
# Attributes that do not make a 6 a 0, and categories that are used alike.
FAST_DIGITS = {
    "combine": "deform", "attributes": 8, "attribute_least": 0.5, "balance": 0.1, "twin": 0,
}
GREY = FAST_DIGITS | {
    "blur": 4.0, "shut": 6.0, "attributes_from": 2000, "steps": 8000,
    # Digits are of nearly one size: a prior that says so keeps strokes from being objects.
    "scale_least": 0.25, "scale_most": 0.6,
    # Strokes that are left of a digit are not objects.
    "straight_through": True, "looks": 3, "rounds": 2,
}
# Binary digits, up to three, a third as large: each pixel counts more, and so do attributes.
BINARY = FAST_DIGITS | {
    "likelihood": "bernoulli", "max_objects": 3, "window": 24,
    "scale_least": 0.15, "scale_most": 0.29, "looks": 3, "rounds": 1,
    "attributes_from": 1500, "steps": 8000,
}
# Binary shapes in colours, each of which has a category.
SHAPES = {
    "likelihood": "bernoulli", "classes": 21, "contrast": True, "steps": 3000,
}
SUITED = {
    "fast": {
        "multi-mnist": DIGITS | GREY,
        "multi-mnist-1k": DIGITS | BINARY,
        "multi-mnist-10k": DIGITS | BINARY,
        "multi-dsprites": SHAPES,
    },
    "paper": {
        # 420 epochs (C.4) of 50,000 of the 60,000 images, which the LSTM reads as they are (C.1).
        "multi-mnist": DIGITS | {"window": 32, "embedding": False, "steps": 328_125},
        # Not of the paper; as near to what it has of other data as they allow.
        **dict.fromkeys(
            ("multi-mnist-1k", "multi-mnist-10k"),
            DIGITS | {"likelihood": "bernoulli", "max_objects": 3, "window": 32},
        ),
        "multi-dsprites": {"likelihood": "bernoulli", "classes": 21},
    },
}


@dataclass(frozen=True)
class Guess:
    """What the fast guide makes of a glimpse, for each category."""

    mean: Tensor  # (N, K, D), of z_where
    scale: Tensor  # (N, K, D), its standard deviation
    attributes: tuple[Tensor, Tensor] | None  # (N, K, A) each, the same of z_attr
    # (N, K), nats that an object of the category would add here under a normal likelihood, the
    # densities of its pose and attributes with it, but for a constant.
    logits: Tensor

    def repeat(self, times: int) -> Guess:
        parts = self.mean, self.scale, *(self.attributes or ()), self.logits
        mean, scale, *attributes, logits = (v.repeat(times, *[1] * (v.dim() - 1)) for v in parts)
        return Guess(mean, scale, (attributes[0], attributes[1]) if attributes else None, logits)


class DiscreteAIR(Attend):
    """See the module's docstring.

    :param image_shape: (C, H, W).
    :raises UserError: for settings that contradict each other.
    """

    decoders = ("template", "attribute", "decoder", "contrast")
    rates = ("model", "guide")
    appearance_site = "z_attr"
    across = PLACE.start

    def __init__(self, config: DiscreteAIRConfig, image_shape: tuple[int, int, int]):
        super().__init__()
        c, channels = config, image_shape[0]
        self.config, self.image_shape = config, image_shape
        self.most = self.steps = c.max_objects
        self.classes = c.classes
        # A training sets these: temperature of the relaxed sites, how much attributes count, and
        # what is added to the fast guide's logits of each category, (K,).
        self.temperature: float | None = None
        self.attributes_on = 1.0
        self.start: Tensor | None = None
        if c.networks not in ("fast", "paper") or c.combine not in ("add", "multiply", "deform"):
            raise UserError("networks must be fast or paper, and combine add, multiply or deform")
        where = 7 if c.shear else 5
        # generative model: p(n) for z_pres, p(z_cat), p(z_where), p(z_attr), p(x | C_T)
        self.count_prior: nn.Module = GeometricCount(c.more, c.max_objects)
        self.category_prior: nn.Module = UniformCategory(c.classes)
        self.where_prior: nn.Module = StandardNormal(where)
        self.appearance_prior: nn.Module = StandardNormal(c.attributes)
        self.likelihood = likelihood(c.likelihood, c.sigma, c.likelihood_floor)
        # f_t, f_a, the decoder and what is done to edges
        self.contrast = nets.Contrast() if c.contrast else nn.Identity()
        self.template = nn.Linear(c.classes, c.code)
        nn.init.normal_(self.template.weight)  # categories start apart
        self.attribute: nn.Linear | None = None
        if c.attributes:
            deforms = c.combine == "deform"
            self.attribute = (
                nets.Deformation(c.attributes) if deforms else nn.Linear(c.attributes, c.code)
            )
        # inference networks: the LSTM of what is left to explain, then the parameters of each site
        paper = c.networks == "paper"
        self.latents = 2 + where + c.classes + c.attributes
        self.look: nn.Module
        self.decoder: nn.Module
        if paper:
            self.decoder = nets.PaperDecoder(c.code, channels)
            if c.embedding:
                if min(image_shape[1:]) < 8:
                    raise UserError("with the paper's networks images must be 8 x 8 pixels at"
                                    " least")
                self.look = nets.PaperEmbedding(channels, image_shape[1:])
                features = int(self.look.features)
            else:
                self.look, features = nn.Flatten(), math.prod(image_shape)
            self.encoder = nets.PaperEncoder(channels, c.window)
            self.code = nn.Linear(self.encoder.features, c.classes + 2 * c.attributes)
        else:
            features = 128
            sizes = (c.code, *c.decoder_hidden)
            self.decoder = nn.Sequential(
                nn.SiLU(), nets.SpriteMLP(sizes[0], channels, c.window, sizes[1:])
            )
            self.peak = attention.InkPeak(c.blur, c.shut)
            self.look = nets.WindowEncoder(channels, c.glimpse, c.glimpse_width, features)
            self.turn = attention.TurnSearch(c.angles) if c.angles else None
            self.upright = (
                nets.WindowEncoder(channels, c.glimpse, c.glimpse_width, features)
                if c.looks else None
            )
            near = c.hidden + (2 if c.looks else 1) * features
            if c.attributes:
                self.attributes_head = nn.Linear(near, c.classes * 2 * c.attributes)
        self.rnn = nn.LSTMCell(features + self.latents, c.hidden)
        seen = c.hidden + (0 if paper else features)
        self.presence_head = nn.Linear(seen, 1)
        self.where_head = nn.Linear(seen, 2 * where)
        # What the pose would be for each category, relative to that.
        self.category_head = None if paper else nn.Linear(near, c.classes * 2 * where)
        self.again_head = None if paper or c.looks < 2 else nn.Linear(near, 2 * where)
        with torch.no_grad():
            # With the paper's networks objects are drawn before they look like any.
            self.presence_head.bias.fill_(1.0 if paper else -1.0)
            for head in (self.where_head, self.category_head, self.again_head):
                if head is not None:
                    head.weight.zero_()
                    head.bias.zero_()

    # --- the generative model ---------------------------------------------------------------

    @pyro_method
    def model(self, x: Tensor) -> None:
        """:param x: (B, C, H, W) in [0, 1]; sites z_pres_t, z_cat_t, z_where_t, z_attr_t, x."""
        presence = presence_logits(self.count_prior(), self.steps)  # (T, 2)
        category = self.category_prior().logits
        with pyro.plate("images", len(x), dim=-1):
            here = x.new_ones(len(x))
            objects: list[dict[str, Tensor]] = []
            for t in pyro.markov(range(self.steps), history=self.steps):
                with counted(here):
                    z_pres = pyro.sample(f"z_pres_{t}", self._one_hot(presence[t]))  # (B, 2)
                here = here * z_pres[..., 1]
                with counted(here):
                    z_cat = pyro.sample(f"z_cat_{t}", self._category(category))  # (B, K)
                    z_where = pyro.sample(f"z_where_{t}", self.where_prior())  # (B, D)
                    objects.append({"here": here, "z_cat": z_cat, "z_where": z_where})
                    if self.config.attributes:
                        z_attr = pyro.sample(f"z_attr_{t}", self.appearance_prior())
                        objects[-1]["z_attr"] = z_attr
            canvas = self._drawn(objects, (x.shape[-2], x.shape[-1]))
            pyro.sample("x", self.likelihood(canvas), obs=x)

    def _category(self, logits: Tensor) -> dist.TorchDistribution:
        return self._one_hot(logits, self.config.networks == "paper")

    def _one_hot(self, logits: Tensor, relaxed: bool = True) -> dist.TorchDistribution:
        if self.temperature is None or not relaxed:
            return dist.OneHotCategorical(logits=logits)
        # By the limit no coordinate of a draw underflows, whose density would be infinite.
        logits = logits.log_softmax(-1).clamp(min=-LIMIT * self.temperature)
        kind = (
            dist.RelaxedOneHotCategoricalStraightThrough if self.config.straight_through
            else dist.RelaxedOneHotCategorical
        )
        return kind(logits.new_tensor(self.temperature), logits=logits)

    def pose(self, z_where: Tensor) -> Pose:
        c = self.config
        scale = z_where[..., :2]
        if c.isotropic:
            scale = scale.mean(-1, keepdim=True).expand_as(scale)
        scale = c.scale_least + (c.scale_most - c.scale_least) * scale.sigmoid()
        height, width = self.image_shape[1:]
        if c.isotropic and height != width:  # one scale in pixels, so that a turn bends nothing
            side = math.sqrt(height * width)
            scale = scale * scale.new_tensor([side / width, side / height])
        shear = 0.3 * z_where[..., 5:] if c.shear else torch.zeros_like(scale)
        return scale, c.angle_deviation * z_where[..., ANGLE], shear, SPREAD * z_where[..., PLACE]

    def templates(self, kind: Tensor | None, what: Tensor | None) -> Tensor:
        """See the base class; without ``what`` attributes are at their prior's mean, 0."""
        code = self.template(kind)
        if self.attribute is None or not self.attributes_on:
            return self.decoder(code)
        if what is None:
            what = code.new_zeros(len(code), self.config.attributes)
        if isinstance(self.attribute, nets.Deformation):
            return self.attribute(self.decoder(code), self.attributes_on * what)
        other = self.attributes_on * self.attribute(what)
        return self.decoder(code + other if self.config.combine == "add" else code * other)

    @torch.no_grad()
    def split(self, source: int, target: int, seed: int) -> None:
        """Make a category the twin of another, in place: both a little apart from what that was.

        In opposite directions, so that neither is the better one: if two kinds of objects share
        ``source``, what makes a template worse for one makes it better for the other.

        :param seed: of the direction.
        """
        code = self.template.weight[:, source]
        drawn = torch.randn(len(code), generator=torch.Generator().manual_seed(seed))
        step = APART * code.std() * drawn.to(code)
        self.template.weight[:, target] = code - step
        self.template.weight[:, source] = code + step
        assert self.category_head is not None
        for head in (self.category_head, self.attributes_head if self.config.attributes else None):
            for values in () if head is None else (head.weight, head.bias):
                parts = values.unflatten(0, (self.classes, -1))
                parts[target] = parts[source]

    # --- the guide --------------------------------------------------------------------------

    def _attend(self, x: Tensor, choose: Choose) -> list[dict[str, Tensor]]:
        c = self.config
        size = x.shape[-2], x.shape[-1]
        lead = torch.Size((len(x),))
        here, canvas = x.new_ones(lead), torch.zeros_like(x)
        previous, state = x.new_zeros(*lead, self.latents), None
        centres: list[Tensor] = []
        steps = []
        for t in pyro.markov(range(self.steps), history=self.steps):
            left = x - canvas  # to explain, (N, C, H, W)
            if self._thorough and t + 1 < self.steps:
                left = left - self._next(left, previous, state, centres)
            h, state, guess = self._look(left, previous, state, centres)
            presence = self.presence_head(h)
            if guess is not None:
                evidence = guess.logits.amax(-1, keepdim=True) / c.sure
                presence = presence + evidence.clamp(-SURE, SURE)
            logits = torch.cat([torch.zeros_like(presence), presence], -1).view(*lead, 2)
            z_pres = choose(f"z_pres_{t}", self._one_hot(logits), here)
            here = here * z_pres[..., 1]
            if here.shape != lead:  # particles came with the first draw
                times, lead = here.numel() // lead.numel(), here.shape
                x, canvas = (v.repeat(times, 1, 1, 1) for v in (x, canvas))
                h, *both = (v.repeat(times, 1) for v in (h, *state))
                state = both[0], both[1]
                guess = guess and guess.repeat(times)
            found = {"here": here, "z_pres": z_pres}
            if guess is None:
                self._read(found, t, x, h, choose)
            else:
                self._explain(found, t, guess, choose)
            steps.append(found)
            chosen = [v for k, v in found.items() if k != "here"]
            previous = torch.cat([v.expand(*lead, -1).flatten(0, -2) for v in chosen], -1)
            if t + 1 < self.steps:
                with torch.no_grad():
                    canvas = canvas + self._drawn([found], size).flatten(0, -4)
                    centres.append(self.pose(found["z_where"].flatten(0, -2))[3])
        return steps

    @property
    def _thorough(self) -> bool:
        """Whether to take the time that an evaluation has."""
        c = self.config
        return c.networks == "fast" and c.rounds > 0 and self.temperature is None

    def _look(
        self, left: Tensor, previous: Tensor, state: State | None, centres: list[Tensor]
    ) -> tuple[Tensor, State, Guess | None]:
        """What the heads read, (N, h), of what is left to explain, the LSTM's state, and the guess.

        :param left: (N, C, H, W). :param previous: (N, L), of the object before.
        :return: the paper's networks guess nothing.
        """
        centre = self.peak(left, centres) if self.config.networks == "fast" else None
        seen = self.look(
            left if centre is None else attention.glimpse(left, centre, self.config.glimpse)
        )
        state = self.rnn(torch.cat([seen, previous], -1), state)
        if centre is None:
            return state[0], state, None
        h = torch.cat([state[0], seen], -1)
        return h, state, self._guess(left, h, centre)

    @torch.no_grad()
    def _next(
        self, left: Tensor, previous: Tensor, state: State | None, centres: list[Tensor]
    ) -> Tensor:
        """What the object after this one would draw, (N, C, H, W), if that explains enough more.

        Two objects that touch look like another one until one of them is taken away: first as if
        that had been found, and as if the first were one half of the ink, and the other half.

        :param left: (N, C, H, W). :param previous: (N, L), of the object before.
        """
        def nats(rest: Tensor) -> Tensor:
            return rest.square().sum((1, 2, 3)) / (2 * self.config.sigma**2)  # (N,)

        after_it = torch.zeros_like(left)
        best = nats(left - self._likeliest(left, previous, state, centres)[0]) - WORTH
        # Where one object leaves less than that, no two can explain as much more.
        rows = (best > 0).nonzero().squeeze(1)
        if not len(rows):
            return after_it
        left, previous, best = left[rows], previous[rows], best[rows]
        state = state and (state[0][rows], state[1][rows])
        centres = [centre[rows] for centre in centres]
        half = attention.halves(left)
        for start in (left, half * left, (1 - half) * left):
            this, place, latents, then = self._likeliest(start, previous, state, centres)
            for _ in range(self.config.rounds):
                other, *_ = self._likeliest(left - this, latents, then, [*centres, place])
                this, place, latents, then = self._likeliest(
                    left - other, previous, state, centres
                )
            both = nats(left - this - other)
            better = both < best
            after_it[rows[better]], best = other[better], torch.minimum(both, best)
        return after_it

    def _likeliest(
        self, left: Tensor, previous: Tensor, state: State | None, centres: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """The next object as it is likeliest, if there is one.

        :return: what it draws, (N, C, H, W), its centre, (N, 2), its latents, (N, L), and the
            state then.
        """
        _, state, guess = self._look(left, previous, state, centres)
        assert guess is not None
        z_cat = one_hot(guess.logits.argmax(-1), self.classes, left.dtype)
        z_where = _of_chosen(z_cat, guess.mean)
        z_attr = None if guess.attributes is None else _of_chosen(z_cat, guess.attributes[0])
        z_pres = torch.tensor([0.0, 1.0], device=left.device).expand(len(left), -1)
        latents = [v for v in (z_pres, z_cat, z_where, z_attr) if v is not None]
        size = left.shape[-2], left.shape[-1]
        drawn = self.write(self.templates(z_cat, z_attr), z_where, size)
        return drawn, self.pose(z_where)[3], torch.cat(latents, -1), state

    def _where(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z_where, (..., D), of (..., 2 D)."""
        mean, spread = raw.chunk(2, -1)
        return mean, 0.1 * F.softplus(spread - 1.0) + 1e-3

    def _attributes(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z_attr, (..., A), of (..., 2 A)."""
        mean, spread = raw.chunk(2, -1)
        return mean, F.softplus(spread - 1.0) + self.config.attribute_least

    def _read(
        self, found: dict[str, Tensor], t: int, x: Tensor, h: Tensor, choose: Choose
    ) -> None:
        """The paper's order: place first, then what the window of the image there shows."""
        here, side = found["here"], self.config.window
        mean, scale = (v.view(*here.shape, -1) for v in self._where(self.where_head(h)))
        found["z_where"] = choose(f"z_where_{t}", dist.Normal(mean, scale).to_event(1), here)
        transform = to_image(*self.pose(found["z_where"].flatten(0, -2)))
        code = self.code(self.encoder(warp(x, transform, (side, side))))
        logits = code[:, : self.classes].view(*here.shape, -1)
        found["z_cat"] = choose(f"z_cat_{t}", self._category(logits), here)
        if self.config.attributes:
            raw = code[:, self.classes :].view(*here.shape, -1)
            site = dist.Normal(*self._attributes(raw)).to_event(1)
            found["z_attr"] = choose(f"z_attr_{t}", site, here)

    def _guess(self, left: Tensor, h: Tensor, centre: Tensor) -> Guess:
        """For each category the pose and attributes it would have here, and what it would explain.

        :param left: (N, C, H, W). :param h: (N, h). :param centre: (N, 2), of the glimpse.
        """
        c = self.config
        assert self.category_head is not None
        raw, near = self.where_head(h).unsqueeze(1), h  # (N, 1, 2 D), of all categories
        for look in range(c.looks):
            assert self.upright is not None
            if look:
                assert self.again_head is not None
                raw = raw + self.again_head(near).unsqueeze(1)
            with torch.no_grad():
                shared = _round(self._where(raw)[0], centre)  # (N, 1, D)
                upright = windows(left, to_image(*self.pose(shared)), c.glimpse).squeeze(1)
            near = torch.cat([h, self.upright(upright)], -1)
        raw = raw + self.category_head(near).unflatten(-1, (self.classes, -1))
        mean, scale = self._where(raw)  # (N, K, D)
        mean = _round(mean, centre)
        attributes = None
        if c.attributes:
            raw = self.attributes_head(near).unflatten(-1, (self.classes, -1))
            attributes = self._attributes(raw)  # (N, K, A) each
        kinds = torch.eye(self.classes, device=h.device, dtype=h.dtype)
        with torch.no_grad():
            drawn = self.templates(kinds, None)  # (K, C, S, S)
            turned = torch.zeros_like(mean)
            if self.turn is not None:
                size, _, _, place = self.pose(mean)
                turned[..., ANGLE] = self.turn(drawn, left, size, place) / c.angle_deviation
        mean = mean + turned
        with torch.no_grad():
            if attributes is not None and self.attributes_on:
                what, times = attributes[0].flatten(0, 1), len(h)
                if isinstance(self.attribute, nets.Deformation):  # of what is decoded already
                    drawn = self.attribute(drawn.repeat(times, 1, 1, 1), self.attributes_on * what)
                else:
                    drawn = self.templates(kinds.repeat(times, 1), what)
                drawn = drawn.unflatten(0, (times, -1))  # (N, K, C, S, S)
            logits = self._gain(left, drawn, mean) - 0.5 * mean.square().sum(-1)  # (N, K)
            if attributes is not None:
                logits = logits - 0.5 * attributes[0].square().sum(-1)
        return Guess(mean, scale, attributes, logits)

    def _gain(self, left: Tensor, drawn: Tensor, z_where: Tensor) -> Tensor:
        """What an object of each category would add to the log likelihood, nats, (N, K).

        Of a normal likelihood, whatever the model's. Counted in the window, and before `contrast`,
        which costs less than among the pixels, but in an evaluation with `rounds`.

        :param left: (N, C, H, W). :param drawn: (N, K, C, S, S) or (K, C, S, S), its template.
        :param z_where: (N, K, D).
        """
        c = self.config
        pose, size = self.pose(z_where), (left.shape[-2], left.shape[-1])
        transform, cell = to_image(*pose), pose[0].prod(-1) * size[0] * size[1] / c.window**2
        if self._thorough:
            kinds = drawn.expand(len(left), *drawn.shape[-4:]).unbind(1)  # K of (N, C, S, S)
            # One after the other: canvases of all categories at once are K times as large.
            inside = torch.stack([
                attention.gain(left, self.write(*kind, size), left.new_ones(()), c.sigma)
                for kind in zip(kinds, z_where.unbind(1), strict=True)
            ], -1)
            # What is beyond the canvas explains nothing, as in a window: else an object that is
            # there alone would cost nothing where there is none.
            canvas = windows(left.new_ones(len(left), 1, *size), transform, c.window)
            beyond = ((1 - canvas) * self.contrast(drawn).square()).sum((-3, -2, -1))
            return inside - cell * beyond / (2 * c.sigma**2)
        return attention.gain(windows(left, transform, c.window), drawn, cell, c.sigma)

    def _explain(self, found: dict[str, Tensor], t: int, guess: Guess, choose: Choose) -> None:
        """The fast order: the category that explains most, then where and how it does."""
        here, logits = found["here"], guess.logits
        if self.start is not None:
            logits = logits + self.start
        site = self._category(logits.view(*here.shape, -1))
        z_cat = found["z_cat"] = choose(f"z_cat_{t}", site, here)  # (..., K)
        chosen = one_hot(z_cat.detach().argmax(-1), self.classes, z_cat.dtype)
        chosen = chosen.view(-1, self.classes)

        def of_chosen(values: Tensor) -> Tensor:
            return _of_chosen(chosen, values).view(*here.shape, -1)

        site = dist.Normal(of_chosen(guess.mean), of_chosen(guess.scale)).to_event(1)
        found["z_where"] = choose(f"z_where_{t}", site, here)
        if guess.attributes is not None:
            site = dist.Normal(*map(of_chosen, guess.attributes)).to_event(1)
            found["z_attr"] = choose(f"z_attr_{t}", site, here)

    def choose_likeliest(self, name: str, site, here: Tensor) -> Tensor:
        if name.startswith(("z_pres", "z_cat")):
            return one_hot(site.probs.argmax(-1), site.probs.shape[-1], site.probs.dtype)
        return site.mean

    def numbers(self, site: str, value: Tensor) -> Tensor:
        """The category as its index."""
        return value.argmax(-1, keepdim=True).to(value) if site == "z_cat" else value


def _of_chosen(z_cat: Tensor, values: Tensor) -> Tensor:
    """Of values for each category (N, K, D) those for one-hot z_cat (N, K): (N, D)."""
    return (z_cat.unsqueeze(1) @ values).squeeze(1)


def _round(mean: Tensor, centre: Tensor) -> Tensor:
    """z_where (N, K, D) of an object that a network has placed relative to a glimpse.

    By short steps: it is near. :param centre: (N, 2), from -1 to 1 across the image.
    """
    step = mean.new_ones(mean.shape[-1])
    step[PLACE] = 0.2
    return step * mean + F.pad(centre / SPREAD, (3, mean.shape[-1] - 5)).unsqueeze(1)
