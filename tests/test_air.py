"""AIR and Discrete-AIR: densities by enumeration, gradients, scenes and trainings by hand."""

import gc
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_scenes import checkpoint
from pyro_scenes.affine import to_image, to_window, warp
from pyro_scenes.attention import gain
from pyro_scenes.bounds import iwae, log_weights
from pyro_scenes.config import make_config
from pyro_scenes.errors import UserError
from pyro_scenes.models.air import AIR, LARGEST, SMALLEST, AIRConfig
from pyro_scenes.models.attend import Attend
from pyro_scenes.models.discrete_air import SPREAD, DiscreteAIR, DiscreteAIRConfig
from pyro_scenes.nets import Contrast, Deformation, LookingCell
from pyro_scenes.objectives.air import (
    AIRObjective,
    AIRSchedule,
    DiscreteAIRObjective,
    DiscreteAIRSchedule,
    OrderedGraph_ELBO,
    Rescue,
)
from pyro_scenes.objectives.base import Objective
from pyro_scenes.priors import GeometricCount, UniformCount, presence_logits

SHAPE = (1, 8, 8)
DISCRETE = DiscreteAIRConfig(
    max_objects=2, classes=2, attributes=1, window=4, code=6, decoder_hidden=(5,), hidden=6,
    glimpse=8, glimpse_width=4, angles=8, shear=False, likelihood="normal", sigma=0.8, more=0.4,
)
DISCRETE_PAPER = replace(DISCRETE, networks="paper", window=32, angles=0, isotropic=False)
PLAIN = AIRConfig(
    max_objects=3, latent=2, window=4, decoder_hidden=(5,), encoder_hidden=(5,), hidden=6,
    glimpse=8, glimpse_width=4, likelihood="normal", sigma=0.8, more=0.4,
)
PLAIN_PAPER = replace(PLAIN, networks="paper")
FOUR = {
    "discrete-air": lambda: DiscreteAIR(DISCRETE, SHAPE),
    "discrete-air, paper": lambda: DiscreteAIR(DISCRETE_PAPER, SHAPE),
    "air": lambda: AIR(PLAIN, SHAPE),
    "air, paper": lambda: AIR(PLAIN_PAPER, SHAPE),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=FOUR)
def model(request: pytest.FixtureRequest) -> Attend:
    return FOUR[request.param]().eval()


def sites(function: Callable, x: Tensor, values: dict[str, Tensor] | None = None) -> dict:
    """The sites of a model or a guide, given some of their values, with log_prob."""
    trace = poutine.trace(poutine.condition(function, data=values or {})).get_trace(x)
    trace.compute_log_prob()
    return {name: site for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site_is_subsample(site)}


def density(function: Callable, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    return sum(site["log_prob"] for site in sites(function, x, values).values())


def draw(model: Attend, x: Tensor, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Values from the guide, some of them given."""
    return {k: s["value"].detach() for k, s in sites(model.guide, x, values).items()}


def presences(model: Attend, counts: list[int]) -> dict[str, Tensor]:
    """z_pres of images with so many objects; absent ones are followed by a present one."""
    values = {}
    for t in range(model.steps):
        here = torch.tensor([float(n > t or n < t) for n in counts])
        two = torch.stack([1 - here, here], -1)
        values[f"z_pres_{t}"] = two if isinstance(model, DiscreteAIR) else here
    return values


# --- against enumeration -------------------------------------------------------------------------


class Pinned(Messenger):
    """Continuous sites are where they are said to be, in model and guide."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: dict) -> None:
        value = self.values.get(msg["name"])
        if value is not None:
            value = value.expand(*msg["fn"].batch_shape, len(value))
            msg["fn"] = dist.Delta(value, event_dim=1)


@dataclass
class Case:
    """A model with pinned objects, and all that its discrete sites can be."""

    model: Attend
    x: Tensor  # (B, 1, 8, 8)
    pinned: Pinned
    values: list[dict[str, Tensor]]  # of the discrete sites
    joint: np.ndarray  # log p(x, the same), (values, B)

    @property
    def truth(self) -> list[float]:
        """log p(x), (B,)."""
        return np.logaddexp.reduce(self.joint, 0).tolist()


CORNERS = [(0, 1), (3, 2), (4, 4)]  # row and column of an object's first pixel; two overlap
ATTRIBUTES = [0.8, -0.5, 0.3]
INK = np.random.default_rng(3).random((2, 4, 4)).astype(np.float32)  # of two categories


def geometric(more: float, limit: int) -> list[float]:
    return [(1 - more) * more**n for n in range(limit)] + [more**limit]


def case(model: Attend, masses: list[float] | None = None) -> Case:
    """Templates INK[kind] + 0.2 attribute, in windows of 4 x 4 pixels at CORNERS."""
    c, steps = model.config, model.steps
    masses = geometric(c.more, steps) if masses is None else masses
    discrete = isinstance(model, DiscreteAIR)

    def pose(z_where: Tensor):
        """A quarter of the image, without angle or shear, at the last two numbers."""
        half = torch.full_like(z_where[..., :2], 0.5)
        return half, torch.zeros_like(z_where[..., 0]), 0.0 * half, z_where[..., -2:]

    def templates(kind: Tensor | None, what: Tensor | None) -> Tensor:
        kind = torch.tensor([[1.0, 0.0]]) if kind is None else kind
        ink = (kind @ torch.from_numpy(INK).flatten(1)).view(-1, 1, 4, 4)
        return ink if what is None else ink + 0.2 * what[:, :1, None, None]

    model.pose, model.templates = pose, templates
    if c.networks == "paper" and discrete:  # one that costs less
        model.encoder = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
        model.code = nn.Linear((c.window // 8) ** 2, model.code.out_features)
    with torch.no_grad():  # a guide that sees differences
        model.presence_head.weight.mul_(4)
        for parameter in model.rnn.parameters():
            parameter.mul_(3)
    pinned, what = {}, []
    for t in range(steps):
        (row, column), appearance = CORNERS[t], ATTRIBUTES[t]
        where = torch.zeros(model.where_prior.zero.shape)
        where[-2:] = torch.tensor([(column + 2) / 4 - 1, (row + 2) / 4 - 1])
        pinned[f"z_where_{t}"] = where
        what.append(torch.full(model.appearance_prior.zero.shape, appearance))
        pinned[f"z_attr_{t}" if discrete else f"z_what_{t}"] = what[t]
    x = 0.5 * torch.rand(3, *SHAPE)
    for b, t in ((1, 0), (2, 0), (2, 1)):
        row, column = CORNERS[t]
        x[b, 0, row:row + 4, column:column + 4] += torch.from_numpy(INK[t % 2])
    values, joint = [], []
    for n in range(steps + 1):
        for kinds in np.ndindex(*[2 if discrete else 1] * n):
            if masses[n] > 0:
                values.append(_values(model, len(x), n, kinds))
                joint.append(_joint(x.numpy(), masses[n], kinds, c.sigma, discrete))
    return Case(model, x, Pinned(pinned), values, np.array(joint))


def _values(model: Attend, rows: int, n: int, kinds: tuple[int, ...]) -> dict[str, Tensor]:
    values = presences(model, [n] * rows)
    if isinstance(model, DiscreteAIR):
        for t in range(model.steps):
            kind = torch.tensor(kinds[t] if t < n else 0)
            values[f"z_cat_{t}"] = nn.functional.one_hot(kind, 2).float().expand(rows, 2)
    return values


def _joint(x: np.ndarray, mass: float, kinds: tuple[int, ...], sigma: float, discrete: bool):
    canvas = np.zeros((8, 8))
    for t, kind in enumerate(kinds):
        row, column = CORNERS[t]
        canvas[row:row + 4, column:column + 4] += INK[kind] + 0.2 * ATTRIBUTES[t]
    squares = (((x[:, 0] - canvas) / sigma) ** 2).sum((1, 2))
    constant = 64 * math.log(sigma * math.sqrt(2 * math.pi))
    prior = math.log(mass) - len(kinds) * math.log(2 if discrete else 1)
    return prior - 0.5 * squares - constant


@pytest.fixture(params=["geometric", "uniform"])
def enumerated(model: Attend, request: pytest.FixtureRequest) -> Case:
    if request.param == "geometric":
        return case(model)
    model.count_prior = UniformCount(1, 2)
    return case(model, [0.0, 0.5, 0.5, 0.0])


def test_the_joint_is_the_enumerated_one(enumerated) -> None:
    c = enumerated
    with c.pinned:
        found = [density(c.model.model, c.x, values).tolist() for values in c.values]
    assert np.allclose(found, c.joint, rtol=1e-5, atol=1e-4)
    assert np.ptp(c.joint, 0).max() > 1  # they do differ


def test_the_guide_is_a_distribution(model) -> None:
    """Over what objects there are, whatever those have that are not."""
    c = case(model)
    with c.pinned, torch.no_grad():
        found = torch.stack([density(model.guide, c.x, values) for values in c.values])
    assert found.logsumexp(0).tolist() == pytest.approx([0.0] * 3, abs=1e-5)


def test_exact_weights_add_up_to_the_exact_likelihood(enumerated) -> None:
    """E_q[p(x, z) / q(z | x)] and E_q[log p(x, z) - log q(z | x)], over all of q."""
    c = enumerated
    with c.pinned, torch.no_grad():
        joint = torch.stack([density(c.model.model, c.x, values) for values in c.values])
        guide = torch.stack([density(c.model.guide, c.x, values) for values in c.values])
        torch.manual_seed(0)
        weights = log_weights(c.model, c.x, 1500, chunk=4500)
    assert joint.logsumexp(0).tolist() == pytest.approx(c.truth, rel=1e-5)
    # What is drawn has the weights of the enumeration, in the guide's proportions.
    for b in range(3):
        known = joint[:, b] - guide[:, b]
        drawn = weights[:, b][weights[:, b] > -1e5]  # others are impossible by the prior
        nearest = (drawn[:, None] - known).abs().argmin(1)
        assert torch.allclose(drawn, known[nearest], atol=1e-2)
        shares = torch.bincount(nearest, minlength=len(known)) / len(weights)
        expected = guide[:, b].exp()
        error = (expected * (1 - expected) / len(weights)).sqrt()
        assert ((shares - expected).abs() < 4 * error + 1e-3).all()


def test_the_importance_weighted_bound_reaches_the_exact_likelihood(enumerated) -> None:
    c = enumerated
    with c.pinned:
        weights = log_weights(c.model, c.x, 1500, chunk=4500).double()
        torch.manual_seed(1)
        bound = iwae(c.model, c.x, 1500, chunk=4500)
    relative = (weights - torch.tensor(c.truth).double()).exp()  # of mean 1
    error = relative.std(0) / math.sqrt(len(weights))
    assert error.max() < 0.2  # of differences beyond 1
    for b in range(3):
        assert abs(bound[b].item() - c.truth[b]) < 4 * error[b].item() + 1e-4


def test_the_bound_is_below_the_exact_likelihood(model) -> None:
    """With one particle it is the ELBO, with more it rises to the truth."""
    c = case(model)
    with c.pinned, torch.no_grad():
        guide = torch.stack([density(model.guide, c.x, values) for values in c.values]).double()
        elbo = (guide.exp() * (torch.from_numpy(c.joint) - guide)).sum(0)
        weights = log_weights(model, c.x, 1500, chunk=4500).double()
    error = weights.std(0) / math.sqrt(len(weights))
    assert ((weights.mean(0) - elbo).abs() < 4 * error).all()
    truth = torch.tensor(c.truth).double()
    few = weights.view(-1, 10, 3).logsumexp(1) - math.log(10)
    assert (few.mean(0) < truth + 4 * few.std(0) / math.sqrt(len(few))).all()
    assert (elbo < truth - 0.01).all() and (few.mean(0) > elbo + 4 * error).all()


# --- the gradient of z_pres ----------------------------------------------------------------------


class Unaided(Messenger):
    """No site has a baseline."""

    def _pyro_sample(self, msg: dict) -> None:
        msg["infer"].pop("baseline", None)


class Nudged(nn.Module):
    """A head of z_pres whose logits may be moved, image by image and step by step."""

    def __init__(self, head: nn.Module, rows: int, steps: int):
        super().__init__()
        self.head, self.calls = head, 0
        self.nudge = nn.Parameter(torch.zeros(rows, steps, 1))

    def forward(self, h: Tensor) -> Tensor:
        t = self.calls % self.nudge.shape[1]
        self.calls += 1
        return self.head(h) + self.nudge[:, t]


def estimates(c: Case, copies: int) -> Tensor:
    """Of the ELBO's gradient with respect to each logit of z_pres, (copies, B, T)."""
    model, head = c.model, c.model.presence_head
    model.presence_head = nudged = Nudged(head, copies * len(c.x), model.steps)
    model.zero_grad()
    OrderedGraph_ELBO().loss_and_grads(model.model, model.guide, c.x.repeat(copies, 1, 1, 1))
    model.presence_head = head
    return -nudged.nudge.grad.view(copies, len(c.x), -1).double()


def exact_gradient(c: Case) -> Tensor:
    """The same by enumeration, (B, T)."""
    head = c.model.presence_head
    c.model.presence_head = nudged = Nudged(head, len(c.x), c.model.steps)
    guide = torch.stack([density(c.model.guide, c.x, values) for values in c.values]).double()
    elbo = (guide.exp() * (torch.from_numpy(c.joint) - guide)).sum()
    c.model.presence_head = head
    return torch.autograd.grad(elbo, nudged.nudge)[0].squeeze(-1).double()


def test_the_papers_encoder_reads_the_image_and_its_lstm_what_is_left() -> None:
    """Section 2.2 and appendix C.1; of Multi-MNIST the LSTM reads the pixels."""
    model = DiscreteAIR(replace(DISCRETE_PAPER, max_objects=2, embedding=False), SHAPE).eval()
    assert model.rnn.input_size == math.prod(SHAPE) + model.latents
    read, looked = [], []
    model.encoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    model.look.register_forward_pre_hook(lambda module, inputs: looked.append(inputs[0]))
    x = torch.rand(5, *SHAPE)
    trace = poutine.trace(model.guide).get_trace(x)
    for t in range(2):
        transform = to_image(*model.pose(trace.nodes[f"z_where_{t}"]["value"]))
        torch.testing.assert_close(read[t], warp(x, transform, (32, 32)))
    assert torch.equal(looked[0], x) and not torch.allclose(looked[1], x)
    digits, sprites = (make_config("discrete-air", data, "paper") for data in
                       ("multi-mnist", "multi-sprites"))
    assert not digits.net.embedding and sprites.net.embedding
    assert (digits.train.steps, sprites.train.steps) == (420 * 50_000 / 64, 300 * 80_000 / 64)


@pytest.mark.parametrize("config", [PLAIN, PLAIN_PAPER], ids=["fast", "paper"])
def test_the_score_has_the_exact_gradient_on_average(config) -> None:
    """With the baselines, and without: those change the variance alone."""
    c = case(AIR(replace(config, max_objects=2, sigma=0.4), SHAPE))
    with c.pinned:
        exact = exact_gradient(c)
        aided = estimates(c, 3000)
        with Unaided():
            unaided = estimates(c, 3000)
    for found in (aided, unaided):
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - exact).abs() < 4 * error).all()
    # Near enough for a wrong term to show.
    assert (aided.std(0) / math.sqrt(len(aided))).norm() < 0.05 * exact.norm()
    assert aided.var(0).sum() < 0.4 * unaided.var(0).sum()


@pytest.mark.parametrize("config", [PLAIN, PLAIN_PAPER], ids=["fast", "paper"])
def test_the_order_of_draws_tells_what_tracking_them_does(config) -> None:
    """Same draws, same loss and gradients as by Pyro's own bookkeeping."""
    model = AIR(replace(config, max_objects=3), SHAPE)
    x = torch.rand(6, *SHAPE)
    outcomes = []
    for elbo in (TraceGraph_ELBO(), OrderedGraph_ELBO()):
        model.zero_grad()
        torch.manual_seed(1)
        loss = elbo.loss_and_grads(model.model, model.guide, x)
        outcomes.append((loss, [p.grad.clone() for p in model.parameters()]))
    (tracked, theirs), (ordered, ours) = outcomes
    assert ordered == pytest.approx(tracked, rel=1e-6)
    for one, other in zip(theirs, ours, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("images", [1, 6])
@pytest.mark.parametrize("config", [PLAIN, PLAIN_PAPER], ids=["fast", "paper"])
def test_two_particles_train_as_twice_the_images_do(config, images) -> None:
    """Half as much, as theirs are a mean; the baseline too."""
    model, x = AIR(replace(config, max_objects=2), SHAPE), torch.rand(images, *SHAPE)
    particles = TraceGraph_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    outcomes = []
    for elbo, seen in ((particles, x), (TraceGraph_ELBO(), x.repeat(2, 1, 1, 1))):
        model.zero_grad()
        torch.manual_seed(1)
        loss = elbo.loss_and_grads(model.model, model.guide, seen)
        outcomes.append((loss, [p.grad.clone() for p in model.parameters()]))
    (mean, ours), (whole, theirs) = outcomes
    assert mean == pytest.approx(whole / 2, rel=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other / 2, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert all(p.grad.any() for p in model.baseline.parameters())


def test_a_step_leaves_no_tensors_to_be_collected() -> None:
    """Closures that refer to themselves keep a step's memory for as long as Python likes."""
    model = AIR(replace(PLAIN, max_objects=2), SHAPE)
    objective, x = AIRObjective(AIRSchedule(), model, 10), torch.rand(3, *SHAPE)
    left = []
    gc.collect()
    gc.disable()
    try:
        for step in range(3):
            objective.backward(model, x, step)
            left.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    finally:
        gc.enable()
    assert left[1] == left[2]


def test_a_batch_of_one_image_trains_as_others_do() -> None:
    """The baseline too, which is fitted to what the image gained."""
    model = AIR(replace(PLAIN, max_objects=2), SHAPE)
    objective = AIRObjective(AIRSchedule(), model, 10)
    torch.manual_seed(0)
    objective.backward(model, torch.rand(1, *SHAPE), 5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for part in (model.baseline, model.presence_head):
        assert all(parameter.grad.any() for parameter in part.parameters())


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 16, 64), (1, 12, 3)])
def test_an_isotropic_object_is_turned_without_being_bent(shape) -> None:
    """In pixels what the pose does to a window's axes is a turn and one scale, (8, 8) as ever."""
    model = DiscreteAIR(replace(DISCRETE, isotropic=True), shape)
    z_where = torch.randn(50, model.where_prior().event_shape[0])
    scale, angle, shear, place = model.pose(z_where)
    transform = to_image(scale, angle, torch.zeros_like(shear), place)[:, :2, :2]
    pixels = torch.tensor([shape[2] / 2, shape[1] / 2])[:, None] * transform
    gram = pixels.mT @ pixels  # a multiple of the identity
    size = gram[:, :1, :1]
    assert torch.allclose(gram, size * torch.eye(2), rtol=1e-4, atol=1e-4 * float(size.max()))
    c = model.config
    least, most = (math.sqrt(shape[1] * shape[2]) / 2 * s for s in (c.scale_least, c.scale_most))
    assert ((size.sqrt() >= least * 0.999) & (size.sqrt() <= most * 1.001)).all()


@pytest.mark.parametrize("likelihood", ["normal", "bernoulli"])
def test_a_baseline_starts_from_what_the_image_has_without_more_objects(likelihood) -> None:
    model = AIR(replace(PLAIN, max_objects=2, likelihood=likelihood, likelihood_floor=0.1), SHAPE)
    for parameter in model.baseline.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(5, *SHAPE).round()
    sites = poutine.trace(model.guide).get_trace(x).nodes
    drawn = {name: sites[f"{name}_0"]["value"] for name in ("z_where", "z_what")}
    first = model._drawn([drawn | {"here": sites["z_pres_0"]["value"]}], SHAPE[1:])
    assert sites["z_pres_0"]["value"].any() and first.amax() > 0.1
    for t, canvas in enumerate((torch.zeros_like(x), first)):
        given = sites[f"z_pres_{t}"]["infer"]["baseline"]
        found = given["nn_baseline"](given["nn_baseline_input"])
        expected = (
            torch.distributions.Normal(canvas, 0.8).log_prob(x) if likelihood == "normal"
            else torch.distributions.Bernoulli(0.1 + 0.8 * canvas.clamp(0, 1)).log_prob(x)
        ).sum((1, 2, 3))
        torch.testing.assert_close(found, expected)


def test_a_baseline_that_is_off_learns_what_is_to_come() -> None:
    c = case(AIR(replace(PLAIN_PAPER, max_objects=2, sigma=0.4), SHAPE))
    optimizer = torch.optim.Adam(c.model.groups()["baseline"])
    with torch.no_grad():
        c.model.baseline[-1].bias += 1.0  # hundreds of nats
    with c.pinned:
        before = estimates(c, 300).var(0).sum()
        for step in range(30):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 30)
            estimates(c, 10)
            optimizer.step()
        after = estimates(c, 300).var(0).sum()
    assert after < 0.5 * before


# --- the cell ------------------------------------------------------------------------------------


def test_a_step_of_a_cell_that_looks_is_torchs() -> None:
    """Also without a state, which is one of zeros."""
    cell = LookingCell(7, 4)
    look, step = cell.opened(5)
    ours = theirs = None
    for _ in range(2):
        seen, other = torch.randn(3, 5), torch.randn(3, 2)
        ours = step(look(seen), other, ours)
        theirs = nn.LSTMCell.forward(cell, torch.cat([seen, other], -1), theirs)
        torch.testing.assert_close(ours, theirs)


# --- densities by hand ---------------------------------------------------------------------------


def test_objects_that_are_not_there_are_not_decoded(model) -> None:
    counts = list(range(model.steps + 1))
    x = torch.rand(len(counts), *SHAPE)
    values = draw(model, x, presences(model, counts))
    decoded: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, given: decoded.append(len(given[0])))
    density(model.model, x, values)
    assert decoded == [sum(counts)]


def test_absent_objects_cost_nothing(model) -> None:
    """The same densities, to the last bit, whatever the latents of absent objects are."""
    counts = list(range(model.steps + 1))
    x = torch.rand(len(counts), *SHAPE)
    values = draw(model, x, presences(model, counts))
    others, present = dict(values), dict(values)
    for name, value in values.items():
        kind, t = name.rsplit("_", 1)
        here = (torch.tensor(counts) > int(t)).view(-1, *[1] * (value.dim() - 1))
        if kind == "z_pres":
            # Only the first absence counts.
            first = (torch.tensor(counts) == int(t)).view(here.shape)
            others[name] = torch.where(here | first, value, 1 - value)
            continue
        changed = value.roll(1, -1) if kind == "z_cat" else value + torch.randn_like(value)
        others[name] = torch.where(here, value, changed)
        present[name] = torch.where(here, changed, value)
    for function in (model.model, model.guide):
        total = density(function, x, values)
        assert torch.equal(density(function, x, others), total)
        assert ((density(function, x, present) - total).abs() > 1e-4).tolist() == [
            n > 0 for n in counts]
        for name, site in sites(function, x, values).items():
            if name != "x":
                kind, t = name.rsplit("_", 1)
                absent = torch.tensor(counts) + (kind == "z_pres") <= int(t)
                assert (site["log_prob"][absent] == 0).all()
                assert (site["log_prob"][~absent] != 0).all()


def concrete(logits: np.ndarray, value: np.ndarray, temperature: float) -> float:
    """Log density of a relaxed one-hot vector (Maddison et al. 2017, eq. 10)."""
    size, odds = len(value), np.exp(logits)
    constant = math.lgamma(size) + (size - 1) * math.log(temperature)
    powers = (np.log(odds) - (temperature + 1) * np.log(value)).sum()
    return constant + powers - size * math.log((odds * value**-temperature).sum())


def test_relaxed_objects_count_as_much_as_they_are_there() -> None:
    model, x = DiscreteAIR(replace(DISCRETE_PAPER, more=0.3), SHAPE).eval(), torch.rand(1, *SHAPE)
    model.temperature = 0.7
    values = draw(model, x) | {
        "z_pres_0": torch.tensor([[0.4, 0.6]]), "z_pres_1": torch.tensor([[0.7, 0.3]]),
        "z_cat_0": torch.tensor([[0.2, 0.8]]), "z_cat_1": torch.tensor([[0.9, 0.1]]),
    }
    found = {k: s["log_prob"].item() for k, s in sites(model.model, x, values).items()}
    stop = np.log([0.7, 0.3])  # at every step, by the geometric prior
    weights = {"z_pres_0": 1.0, "z_cat_0": 0.6, "z_pres_1": 0.6, "z_cat_1": 0.6 * 0.3}
    for name, weight in weights.items():
        logits = stop if "pres" in name else np.log([0.5, 0.5])
        alone = concrete(logits, values[name][0].double().numpy(), 0.7)
        assert found[name] == pytest.approx(weight * alone, rel=1e-4)
    canvas = torch.zeros(SHAPE)
    for t, weight in enumerate((0.6, 0.18)):
        z_where = values[f"z_where_{t}"]
        normal = -0.5 * (z_where.square().sum() + z_where.numel() * math.log(2 * math.pi))
        assert found[f"z_where_{t}"] == pytest.approx(weight * normal.item(), rel=1e-4)
        template = model.templates(values[f"z_cat_{t}"], values[f"z_attr_{t}"])
        drawn = warp(template, to_window(*model.pose(z_where)), SHAPE[1:])
        canvas = canvas + weight * drawn[0]
    expected = torch.distributions.Normal(canvas, 0.8).log_prob(x[0]).sum()
    assert found["x"] == pytest.approx(expected.item(), rel=1e-5)
    # The guide's count the same.
    for name, site in sites(model.guide, x, values).items():
        if name in weights and name.startswith("z_pres"):
            alone = site["fn"].log_prob(values[name]).item()
            assert site["log_prob"].item() == pytest.approx(weights[name] * alone, rel=1e-4)


@pytest.mark.parametrize("combine", ["add", "multiply"])
def test_templates_by_hand(combine) -> None:
    model = DiscreteAIR(replace(DISCRETE, combine=combine, attributes=2), SHAPE).eval()
    kind, what = torch.tensor([[0.0, 1.0], [0.3, 0.7]]), torch.randn(2, 2)
    first = kind @ model.template.weight.T + model.template.bias
    second = what @ model.attribute.weight.T + model.attribute.bias
    code = first + second if combine == "add" else first * second
    found = model.templates(kind, what)
    assert torch.allclose(found, model.decoder(code), atol=1e-6)
    assert found.shape == (2, 1, 4, 4) and ((found > 0) & (found < 1)).all()


@pytest.mark.parametrize("combine", ["add", "multiply", "deform"])
def test_templates_without_attributes_have_them_at_0(combine: str) -> None:
    model = DiscreteAIR(replace(DISCRETE, combine=combine, attributes=2), SHAPE).eval()
    kind = torch.eye(2)
    found = model.templates(kind, None)
    assert torch.equal(found, model.templates(kind, torch.zeros(2, 2)))
    if combine != "deform":  # the attributes' network has something to say at 0, too
        model.attributes_on = 0.0
        assert not torch.allclose(found, model.templates(kind, None), atol=1e-3)


def deforming() -> DiscreteAIR:
    config = replace(DISCRETE, combine="deform", classes=3, attributes=2, window=8)
    return DiscreteAIR(config, SHAPE).eval()


def test_attributes_of_0_deform_nothing() -> None:
    model, kind = deforming(), torch.eye(3)
    plain = model.decoder(model.template(kind))
    assert torch.allclose(model.templates(kind, torch.zeros(3, 2)), plain, atol=1e-6)
    assert not torch.allclose(model.templates(kind, torch.ones(3, 2)), plain, atol=1e-3)
    model.attributes_on = 0.0
    assert torch.equal(model.templates(kind, torch.ones(3, 2)), plain)


def test_attributes_that_bend_and_thicken_by_hand() -> None:
    """The first reads all two pixels to the right and one up; the second doubles odds."""
    model = deforming()
    field, odds = model.attribute.weight.data.split([32, 1])
    field.zero_()
    field[:16, 0], field[16:, 0] = 2 * 2 / 8, -1 * 2 / 8
    odds[0] = torch.tensor([0.0, math.log(2.0)])
    picture = torch.rand(3, 2, 8, 8)
    moved = torch.zeros_like(picture)
    moved[..., 1:, :6] = picture[..., :7, 2:]
    what = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    bolder = [2 * v / (1 + v) for v in (picture[1], moved[2])]
    expected = torch.stack([moved[0], *bolder])
    assert torch.allclose(model.attribute(picture, what), expected, atol=1e-5)


def test_a_bend_is_smooth_between_its_points() -> None:
    """It is bicubic: one point moves its neighbourhood alone."""
    model = deforming()
    model.attribute.weight.data.zero_()
    model.attribute.weight.data[5, 0] = 0.1  # x of the second point of the second row
    across = torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    apart = model.attribute(across, torch.tensor([[1.0, 0.0]])) - across
    inside = apart[0, 0, :, 1:-1]  # a ramp, which is read at 0.1 / 2 * 8 pixels more
    row, column = divmod(int(inside.argmax()), 6)
    assert abs(row - 7 / 3) < 1 and abs(column + 1 - 7 / 3) < 1
    assert 0.8 < inside.max() / (0.4 / 7) <= 1.001 and inside[-1].abs().max() < 1e-3


def test_a_deformation_is_torchs_interpolation_of_each_pictures_points() -> None:
    attribute = Deformation(3).double()
    picture, what = torch.rand(5, 1, 9, 9).double(), torch.randn(5, 3).double()
    bends = (what @ attribute.weight[:-1].T).view(5, 2, 4, 4)
    field = nn.functional.interpolate(bends, size=(9, 9), mode="bicubic", align_corners=True)
    same = torch.eye(2, 3).double().expand(5, 2, 3)
    place = nn.functional.affine_grid(same, [5, 1, 9, 9], False) + field.permute(0, 2, 3, 1)
    bent = nn.functional.grid_sample(picture, place, align_corners=False)
    odds = bent / (1 - bent) * (what @ attribute.weight[-1]).exp().view(5, 1, 1, 1)
    assert field.std() > 0.02
    assert torch.allclose(attribute(picture, what), odds / (1 + odds), atol=1e-12)


def test_gradients_of_a_deformation_against_finite_differences() -> None:
    attribute = Deformation(2).double()
    picture, what = torch.rand(2, 1, 5, 5).double(), torch.randn(2, 2).double()
    assert torch.autograd.gradcheck(
        attribute, (picture.requires_grad_(), what.requires_grad_()), eps=1e-7, atol=1e-5
    )


def test_deformations_far_out_have_finite_gradients() -> None:
    model, picture = deforming(), torch.tensor([0.0, 1.0, 0.5, 1e-8]).repeat(16).view(1, 1, 8, 8)
    what = torch.tensor([[1e4, -1e4]], requires_grad=True)
    for sign in (1, -1):
        found = model.attribute(picture, sign * what)
        assert found.isfinite().all() and (found >= 0).all() and (found <= 1).all()
        gradient, = torch.autograd.grad(found.sum(), what)
        assert gradient.isfinite().all()


def test_a_contrast_by_hand() -> None:
    """Nothing is changed at first, and 0, a half and 1 never are."""
    contrast, y = Contrast().double(), torch.linspace(0, 1, 9, dtype=torch.float64)
    assert torch.allclose(contrast(y), y, atol=2e-6)
    for exponent in (3.0, 1 / 3):
        nn.init.constant_(contrast.log_exponent, math.log(exponent))
        expected = y**exponent / (y**exponent + (1 - y) ** exponent)
        assert torch.allclose(contrast(y), expected, atol=1e-9)
        assert torch.equal(contrast(y[[0, -1]]), y[[0, -1]])


@pytest.mark.parametrize("exponent", [1e-30, 0.1, 1.0, 30.0, 1e30])
def test_contrasts_have_finite_gradients(exponent) -> None:
    contrast, y = Contrast(), torch.tensor([0.0, 1e-12, 0.3, 0.5, 1.0 - 6e-8, 1.0])
    nn.init.constant_(contrast.log_exponent, math.log(exponent))
    found = contrast(y.requires_grad_())
    assert (found >= 0).all() and (found <= 1).all() and (found.diff() >= 0).all()
    gradients = torch.autograd.grad(found.sum(), [y, contrast.log_exponent])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind, config", [
    (DiscreteAIR, replace(DISCRETE, contrast=True)), (AIR, replace(PLAIN, contrast=True)),
])
def test_an_exponent_sharpens_what_is_drawn_on_the_canvas(kind, config) -> None:
    """In the model and in scenes alike; the template itself stays as it is."""
    model = kind(config, (1, 12, 20)).eval()
    nn.init.constant_(model.presence_head.bias, 99.0)
    scene = model.infer(torch.rand(5, 1, 12, 20))
    sprites, layers = model.sprites(scene), model.layers(scene)
    nn.init.constant_(model.contrast.log_exponent, 1.0)
    assert torch.equal(model.sprites(scene), sprites)
    odds, sharp = torch.logit(layers, eps=1e-6), torch.logit(model.layers(scene), eps=1e-6)
    near = odds.abs() < 4
    assert near.any() and torch.allclose(sharp[near], math.e * odds[near], atol=1e-3)
    x = torch.rand(2, 1, 12, 20)
    trace = poutine.trace(model.model).get_trace(x)
    plain = {name: site["value"] for name, site in trace.nodes.items() if name[:2] == "z_"}
    with torch.no_grad():
        before = poutine.trace(poutine.condition(model.model, plain)).get_trace(x)
        nn.init.constant_(model.contrast.log_exponent, -3.0)
        after = poutine.trace(poutine.condition(model.model, plain)).get_trace(x)
    assert not torch.allclose(before.nodes["x"]["fn"].mean, after.nodes["x"]["fn"].mean)
    assert any(p is model.contrast.log_exponent for p in model.generative())
    assert any(p is model.contrast.log_exponent for p in model.groups()["model"])


def test_the_guide_compares_each_category_deformed_as_the_model_draws_it(monkeypatch) -> None:
    model, seen = deforming(), []

    def noted(left: Tensor, drawn: Tensor, mean: Tensor) -> Tensor:
        seen.append(drawn)
        return mean[..., 0]

    monkeypatch.setattr(model, "_gain", noted)
    left, h = torch.rand(2, *SHAPE), torch.randn(2, model.attributes_head.in_features)
    guess = model._guess(left, h, torch.zeros(2, 2))
    kinds = torch.eye(3).repeat(2, 1)
    expected = model.templates(kinds, guess.attributes[0].flatten(0, 1)).view(2, 3, 1, 8, 8)
    assert torch.allclose(seen[0], expected, atol=1e-6)


def test_poses_by_hand() -> None:
    """Of the prior's mean and of what is one deviation away, each by the configuration's word."""
    zeros, ones = torch.zeros(1, 3), torch.ones(1, 3)
    model = AIR(replace(PLAIN, scale_mean=0.3, scale_deviation=0.4, place_deviation=0.6), SHAPE)
    scale, angle, shear, translation = model.pose(zeros)
    assert scale.tolist() == [[pytest.approx(0.3)] * 2] and not angle.any() and not shear.any()
    assert not translation.any()
    scale, _, _, translation = model.pose(ones)
    assert scale.tolist() == [[pytest.approx(0.3 * math.exp(0.4))] * 2]
    assert translation.tolist() == [[pytest.approx(0.6)] * 2]
    for z, limit in ((-1e3, SMALLEST), (1e3, LARGEST)):
        assert model.pose(z * ones)[0].tolist() == [[pytest.approx(limit)] * 2]

    config = replace(DISCRETE, scale_least=0.1, scale_most=0.7, angle_deviation=0.9, shear=True)
    for isotropic in (True, False):
        discrete = DiscreteAIR(replace(config, isotropic=isotropic), SHAPE)
        where = torch.tensor([[-50.0, 50.0, 1.0, 0.3, -0.2, 0.4, 0.0]])
        scale, angle, shear, translation = discrete.pose(where)
        expected = [0.4, 0.4] if isotropic else [0.1, 0.7]
        assert scale[0].tolist() == pytest.approx(expected, abs=1e-4)
        assert angle.item() == pytest.approx(0.9)
        assert translation[0].tolist() == pytest.approx([0.15, -0.1])
        assert shear[0].tolist() == pytest.approx([0.12, 0.0])


# --- priors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("more, limit", [(0.3, 4), (0.9, 1), (0.5, 0)])
def test_the_masses_of_a_geometric_count(more, limit) -> None:
    masses = GeometricCount(more, limit)().logits.exp().tolist()
    assert masses == pytest.approx(geometric(more, limit), rel=1e-5)
    assert sum(masses) == pytest.approx(1.0, rel=1e-5)
    # What the limit takes is the mass of all counts from it on.
    assert masses[-1] == pytest.approx(sum((1 - more) * more**n for n in range(limit, 2000)))


@pytest.mark.parametrize("more", [-0.1, 0.0, 1.0, 1.5])
def test_a_probability_of_one_more_object_lies_between_0_and_1(more) -> None:
    with pytest.raises(UserError, match="one more object"):
        GeometricCount(more, 3)


def test_presences_of_a_geometric_count() -> None:
    """The same odds at every step."""
    found = presence_logits(GeometricCount(0.3, 4)(), 4).exp()
    assert np.allclose(found, [[0.7, 0.3]] * 4, rtol=1e-5)


def test_presences_of_a_uniform_count() -> None:
    found = presence_logits(UniformCount(1, 3)(), 5)
    assert found.isfinite().all()
    expected = torch.tensor([[0, 1], [1 / 3, 2 / 3], [1 / 2, 1 / 2], [1, 0], [1, 0]])
    assert np.allclose(found.exp(), expected, rtol=1e-5, atol=1e-7)


def test_presences_have_the_masses_of_the_counts() -> None:
    for limit in (1, 3, 6):
        masses = torch.rand(limit + 1) * (torch.rand(limit + 1) < 0.7)
        masses[-1] += 0.1
        count = dist.Categorical(probs=masses)
        steps = presence_logits(count, 6).exp().numpy()
        found = [steps[:n, 1].prod() * (steps[n, 0] if n < 6 else 1.0) for n in range(limit + 1)]
        assert np.allclose(found, masses / masses.sum(), atol=1e-6)


def test_a_prior_over_more_objects_than_steps_is_refused(model) -> None:
    with pytest.raises(UserError, match="more objects than the model's 2 steps"):
        presence_logits(UniformCount(0, 3)(), 2)
    presence_logits(UniformCount(0, 2)(), 2)
    with model.priors(count=UniformCount(0, 5)), pytest.raises(UserError, match="more objects"):
        model.sample(2)


def counted(model: Attend, images: int) -> list[int]:
    """Objects of draws from the prior, each count once."""
    drawn = poutine.trace(poutine.uncondition(model.model)).get_trace(torch.zeros(images, *SHAPE))
    here, count = torch.ones(images), torch.zeros(images)
    for t in range(model.steps):
        value = drawn.nodes[f"z_pres_{t}"]["value"]
        here = here * (value if value.dim() == 1 else value[:, 1])
        count += here
    return sorted(set(count.tolist()))


def test_swapped_priors_count(model) -> None:
    before = model.count_prior
    with torch.no_grad():
        for low, high in ((1, 1), (2, 2), (0, 0), (0, 1)):
            with model.priors(count=UniformCount(low, high)):
                assert counted(model, 200) == list(range(low, high + 1))
        assert model.count_prior is before
        assert counted(model, 400) == list(range(model.steps + 1))


def test_samples_are_images(model) -> None:
    """Where bright objects overlap, too."""
    layer = [m for m in model.decoder.modules() if isinstance(getattr(m, "bias", None), Tensor)][-1]
    layer.bias.data.fill_(10.0)
    with model.priors(count=UniformCount(2, 2)):
        drawn = model.sample(100)
    assert drawn.shape == (100, *SHAPE) and drawn.min() >= 0 and drawn.max() == 1


# --- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_relaxed_draws_have_finite_densities(temperature) -> None:
    model = DiscreteAIR(DISCRETE_PAPER, SHAPE)
    model.temperature = temperature
    with pyro.validation_enabled(False):  # as in training
        for extreme in (1.0, 30.0, 1e4):
            logits = extreme * torch.randint(-1, 2, (100_000, 10)).float()
            logits.requires_grad_()
            site = model._one_hot(logits)
            value = site.rsample()
            assert (value > 0).all() and value.sum(-1).sub(1).abs().max() < 1e-5
            total = site.log_prob(value)
            assert total.isfinite().all()
            total.sum().backward()
            assert logits.grad.isfinite().all()


def train(model: Attend, x: Tensor) -> float:
    """Gradients by the ELBO that the model is trained by."""
    if isinstance(model, DiscreteAIR):
        model.temperature = 0.5
    elbo = Trace_ELBO() if isinstance(model, DiscreteAIR) else TraceGraph_ELBO()
    with pyro.validation_enabled(False):
        return elbo.loss_and_grads(model.model, model.guide, x)


def finite(model: Attend) -> bool:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return len(grads) > 8 and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_sure_guides_train(model, logit) -> None:
    """Of presence and of category: where sigma is small, templates differ by thousands of nats."""
    model.likelihood.sigma = 0.01
    model.config = replace(model.config, sigma=0.01)
    with torch.no_grad():
        model.presence_head.bias.fill_(logit)
        if hasattr(model, "code"):
            model.code.bias[:2] = torch.tensor([logit, -logit])
    assert math.isfinite(train(model, torch.rand(50, *SHAPE))) and finite(model)
    model.temperature = None
    assert iwae(model, torch.rand(5, *SHAPE), 10).isfinite().all()


@pytest.mark.parametrize("value", [-1e3, 1e3])
def test_places_far_away_and_extreme_scales_train(model, value) -> None:
    """The guide gives them, and the model draws them."""
    with torch.no_grad():
        model.where_head.bias.fill_(value)
    x = torch.rand(5, *SHAPE)
    assert math.isfinite(train(model, x)) and finite(model)
    model.temperature = None
    values = {k: v for k, v in draw(model, x).items() if k.startswith("z_where")}
    assert all(v.abs().median() > 100 for v in values.values())
    assert iwae(model, x, 3).isfinite().all()
    scene = model.infer(x)
    assert scene.where[scene.present].isfinite().all() and model.render(scene).isfinite().all()


@pytest.mark.parametrize("column", range(3))
def test_each_extreme_place_alone_trains(model, column) -> None:
    """Huge scales are at the places of the image, and far places have scales of the prior."""
    x = torch.rand(4, *SHAPE)
    for value in (-1e3, 1e3):
        values = draw(model, x)
        for t in range(model.steps):
            values[f"z_where_{t}"][:, column] = value
            values[f"z_where_{t}"].requires_grad_()
        total = density(model.model, x, values) + density(model.guide, x, values)
        total.sum().backward()
        grads = [values[f"z_where_{t}"].grad for t in range(model.steps)]
        assert total.isfinite().all() and finite(model)
        assert all(grad.isfinite().all() for grad in grads)


# --- objectives ----------------------------------------------------------------------------------


def spied(elbo: Any, note: Callable) -> list:
    """What an ELBO notes each time that it draws."""
    notes: list = []
    draw = elbo._get_trace

    def noted(*args: Any) -> Any:
        notes.append(note())
        return draw(*args)

    elbo._get_trace = noted
    return notes


def settings(model: nn.Module) -> dict:
    """What an objective may set for a while."""
    plain = {k: v for k, v in vars(model).items() if not k.startswith("_")}
    return plain | {name: id(module) for name, module in model.named_children()}


def test_the_prior_of_air_falls_to_the_configured_one() -> None:
    model = AIR(PLAIN, SHAPE)
    objective = AIRObjective(AIRSchedule(more=0.9, more_begin=10, more_end=30), model, 100)
    notes = spied(objective.elbo, lambda: model.count_prior().logits.exp().tolist())
    before = settings(model)
    for step in (0, 10, 20, 30, 99):
        objective.backward(model, torch.rand(2, *SHAPE), step)
        assert settings(model) == before
    assert np.allclose(model.count_prior().logits.exp(), geometric(0.4, 3), rtol=1e-5)
    more = [0.9, 0.9, math.sqrt(0.9 * 0.4), 0.4, 0.4]
    expected = [geometric(value, 3) for value in more]
    assert np.allclose(notes, expected, rtol=1e-4)


def test_the_temperature_of_discrete_air_falls() -> None:
    model = DiscreteAIR(DISCRETE, SHAPE)
    schedule = DiscreteAIRSchedule(temperature_rate=0.1, temperature_end=0.6)
    objective = DiscreteAIRObjective(schedule, model, 100)
    notes = spied(objective.elbo, lambda: model.temperature)
    before = settings(model)
    for step in (0, 3, 50):
        objective.backward(model, torch.rand(2, *SHAPE), step)
        assert model.temperature is None and settings(model) == before
    assert notes == pytest.approx([1.0, math.exp(-0.3), 0.6])
    with pytest.raises(UserError):  # a step that fails restores, too
        objective.backward(model, torch.rand(2, 1, 9, 9), 0)
    assert model.temperature is None and settings(model) == before


def test_temperatures_that_float32_has_no_room_for_are_refused() -> None:
    """At the coldest that is allowed no draw of unlikely categories has an infinite density."""
    model = DiscreteAIR(DISCRETE, SHAPE)
    with pytest.raises(UserError, match="temperature_end must be at least 0.4"):
        DiscreteAIRObjective(DiscreteAIRSchedule(temperature_end=0.3), model, 100)
    model.temperature = 0.4
    site = model._one_hot(torch.tensor([[0.0, 1e4]]).expand(1_000_000, 2))
    assert site.log_prob(site.sample()).isfinite().all()


def test_categories_are_given_a_start_until_attributes_count() -> None:
    model = DiscreteAIR(DISCRETE, SHAPE)
    schedule = DiscreteAIRSchedule(attributes_from=3, rescue=1.0)
    objective = DiscreteAIRObjective(schedule, model, 100)
    notes = spied(objective.elbo, lambda: (model.attributes_on, model.start is not None))
    for step in (2, 3):
        objective.backward(model, torch.rand(2, *SHAPE), step)
    assert notes == [(0.0, True), (1.0, False)]


@pytest.mark.parametrize("name", FOUR)
def test_losses_and_gradients_are_means_of_the_plain_elbos(name) -> None:
    """On the same draws, when all annealing is over; the baseline's are made smaller."""
    model, x, step = FOUR[name](), torch.rand(6, *SHAPE), 10_000
    objective: Objective
    elbo: Trace_ELBO | TraceGraph_ELBO
    if isinstance(model, DiscreteAIR):
        objective = DiscreteAIRObjective(DiscreteAIRSchedule(), model, 10)
        elbo = Trace_ELBO()
    else:
        objective = AIRObjective(AIRSchedule(), model, 10)
        elbo = TraceGraph_ELBO()
    torch.manual_seed(1)
    loss = objective.backward(model, x, step)["loss"]
    ours = {part: [p.grad for p in group] for part, group in model.groups().items()}
    model.zero_grad(set_to_none=True)
    if isinstance(model, DiscreteAIR):
        model.temperature = 0.5
    torch.manual_seed(1)
    whole = elbo.loss_and_grads(model.model, model.guide, x)
    assert loss == pytest.approx(whole / 6, rel=1e-5)
    for part, group in model.groups().items():
        factor = 6 * (1e4 if part == "baseline" else 1)
        expected = [None if p.grad is None else p.grad / factor for p in group]
        largest = max(float(g.abs().max()) for g in expected if g is not None)
        assert largest > 0
        for found, gradient in zip(ours[part], expected, strict=True):
            # What a norm of batches follows has none but for rounding.
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * largest)


def test_airs_objective_trains_every_parameter() -> None:
    model = AIR(PLAIN, SHAPE)
    AIRObjective(AIRSchedule(), model, 10).backward(model, torch.rand(20, *SHAPE), 0)
    assert all(p.grad.any() for p in model.parameters())


def squares(images: int) -> Tensor:
    """Images of 16 x 16 with one or two squares of 6 x 6, anywhere."""
    x = torch.zeros(images, 1, 16, 16)
    for image in x:
        for _ in range(int(torch.randint(1, 3, ()))):
            row, column = torch.randint(0, 11, (2,)).tolist()
            image[:, row:row + 6, column:column + 6] = 1
    return x


SQUARES: dict[str, Any] = {
    "max_objects": 2, "window": 8, "decoder_hidden": (16,), "hidden": 16, "glimpse": 12,
    "glimpse_width": 4, "blur": 2.0, "shut": 3.0, "likelihood": "normal", "sigma": 0.3,
}


@pytest.mark.parametrize("name", ["discrete-air", "air"])
def test_a_short_training_explains_squares(name) -> None:
    shape, x = (1, 16, 16), squares(300)
    rates: dict[str, Any] = {"learning_rate": 1e-2, "ramp": 0}
    model: AIR | DiscreteAIR
    objective: Objective
    if name == "air":
        model = AIR(AIRConfig(latent=2, encoder_hidden=(16,), scale_mean=0.4, **SQUARES), shape)
        schedule = AIRSchedule(more_begin=20, more_end=30, **rates)
        objective = AIRObjective(schedule, model, 60)
    else:
        config = DiscreteAIRConfig(
            classes=2, code=16, angles=0, scale_least=0.2, scale_most=0.6, **SQUARES
        )
        model = DiscreteAIR(config, shape)
        objective = DiscreteAIRObjective(DiscreteAIRSchedule(**rates), model, 60)
    groups = model.groups()
    optimizer = torch.optim.Adam([{"params": p, "lr": 0.0} for p in groups.values()])
    losses = []
    for step in range(30):
        for group, key in zip(optimizer.param_groups, groups):
            group["lr"] = objective.learning_rates(step)[key]
        optimizer.zero_grad()
        batch = x[torch.randint(250, (32,))]
        losses.append(objective.backward(model, batch, step)["loss"])
        optimizer.step()
    # What images cost that nothing is drawn on.
    empty = -torch.distributions.Normal(0.0, 0.3).log_prob(x).sum((1, 2, 3)).mean().item()
    assert losses[0] > 0.5 * empty and sum(losses[-5:]) / 5 < 0.35 * empty
    found = -iwae(model.eval(), x[250:], 10).mean().item()
    assert found < 0.35 * empty


# --- scenes --------------------------------------------------------------------------------------


# Two shapes of 8 x 8 pixels: a frame, and a cross of less ink.
FRAME, CROSS = torch.zeros(8, 8), torch.zeros(8, 8)
FRAME[:] = 1.0
FRAME[2:6, 2:6] = 0.0
CROSS[3:5] = CROSS[:, 3:5] = 1.0


class Ink(nn.Module):
    """Features: how much ink there is in the glimpse, and nothing else."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features

    def forward(self, glimpse: Tensor) -> Tensor:
        ink = glimpse.clamp(min=0).flatten(1).sum(1, keepdim=True)
        return nn.functional.pad(ink, (0, self.features - 1))


class Shapes(nn.Module):
    """A decoder of given shapes."""

    def __init__(self, shapes: list[Tensor]):
        super().__init__()
        self.shapes = nn.Buffer(torch.stack(shapes)[:, None])

    def forward(self, code: Tensor) -> Tensor:
        code = code if len(self.shapes) > 1 else torch.ones(len(code), 1)
        drawn = code[:, :len(self.shapes)] @ self.shapes.flatten(1)
        return drawn.view(-1, *self.shapes.shape[1:])


def worked(model: Attend, shapes: list[Tensor]) -> Attend:
    """A model of given shapes, whose guide sees an object where there are 5 pixels of ink."""
    hidden = model.config.hidden
    model.look = Ink(model.where_head.in_features - hidden)
    model.decoder = Shapes(shapes)
    with torch.no_grad():
        for head in (model.where_head, model.presence_head):
            head.weight.zero_()
            head.bias.zero_()
        model.presence_head.weight[0, hidden] = 1.0
        model.presence_head.bias.fill_(-5.0)
        if isinstance(model, DiscreteAIR):
            model.template.weight.copy_(torch.eye(len(model.template.weight))[:, :model.classes])
            model.template.bias.zero_()
    return model.eval()


# Windows of 8 x 8 pixels of 32 x 32.
SIZES: dict[str, Any] = {
    "max_objects": 3, "window": 8, "hidden": 4, "glimpse": 12, "likelihood": "normal",
    "blur": 2.0, "shut": 4.0, "sigma": 0.3,
}
SORTING = DiscreteAIRConfig(
    classes=2, attributes=0, code=4, scale_least=0.25, scale_most=0.25, angles=0, **SIZES
)


def sorting(config: DiscreteAIRConfig = SORTING, shapes: list[Tensor] | None = None) -> DiscreteAIR:
    """Discrete-AIR that knows frames, category 0, and crosses, 1."""
    return worked(DiscreteAIR(config, (1, 32, 32)), shapes or [FRAME, CROSS])


def painted(size: tuple[int, int], objects: list[tuple[int, int, Tensor]]) -> Tensor:
    """An image with shapes at centres (x, y)."""
    x = torch.zeros(1, *size)
    for column, row, shape in objects:
        x[0, row - 4:row + 4, column - 4:column + 4] += shape
    return x


def test_scenes_of_discrete_air_by_hand() -> None:
    model = sorting()
    objects = [[(9, 11, FRAME), (23, 21, CROSS)], [(15, 19, CROSS)], [],
               [(7, 7, CROSS), (23, 7, CROSS), (15, 23, FRAME)]]
    x = torch.stack([painted((32, 32), row) for row in objects])
    scene = model.infer(x)
    assert scene.counts.tolist() == [2, 1, 0, 3] and scene.size == (32, 32)
    assert scene.where.shape == (4, 3, 2) and scene.kind is not None and scene.what is None
    for b, row in enumerate(objects):
        here = scene.present[b]
        assert scene.where[b][~here].isnan().all() and (scene.kind[b][~here] == -1).all()
        assert scene.boxes[b][~here].isnan().all() and scene.pose[b][~here].isnan().all()
        found = sorted(zip(scene.where[b][here].tolist(), scene.boxes[b][here].tolist(),
                           scene.kind[b][here].tolist()))
        for (where, box, kind), (column, line, shape) in zip(found, sorted(row, key=_place)):
            assert where == pytest.approx([column, line], abs=0.1)
            assert box == pytest.approx([column, line, 8, 8], abs=0.1)
            assert kind == (0 if shape is FRAME else 1)
    here = scene.present
    assert np.allclose(scene.pose[here], [0.25, 0.25, 0, 0, 0], atol=1e-5)
    assert torch.allclose(model.render(scene), x, atol=0.05)
    assert torch.equal(model.segment(scene) > 0, x[:, 0] > 0.5)
    labels = model.segment(scene)[0]
    assert len(labels[:16].unique()) == len(labels[16:].unique()) == 2
    assert len(labels.unique()) == 3


def _place(thing: tuple[int, int, Tensor]) -> tuple[int, int]:
    return thing[:2]


@pytest.mark.parametrize("kind, config", [
    (DiscreteAIR, replace(DISCRETE, isotropic=False, shear=True)),
    (DiscreteAIR, replace(DISCRETE_PAPER, shear=True)), (AIR, PLAIN), (AIR, PLAIN_PAPER),
    (DiscreteAIR, replace(DISCRETE, contrast=True)), (AIR, replace(PLAIN, contrast=True)),
], ids=[*FOUR, "discrete-air, contrast", "air, contrast"])
def test_a_rendered_scene_is_the_mean_of_what_was_inferred(kind, config) -> None:
    """On a canvas that is not square, at poses that differ in all that a scene keeps."""
    model, x = kind(config, (1, 12, 20)).eval(), torch.rand(5, 1, 12, 20)
    if config.contrast:
        nn.init.constant_(model.contrast.log_exponent, -0.5)  # untrained templates are faint
    chosen = presences(model, [1, 0, 2, 2, 1])

    def choose(name: str, site, here: Tensor) -> Tensor:
        value = chosen.get(name, likeliest(name, site, here))
        chosen[name] = torch.randn_like(value) if name.startswith("z_where") else value
        return chosen[name]

    likeliest, model.choose_likeliest = model.choose_likeliest, choose
    scene = model.infer(x)
    assert scene.counts.tolist() == [1, 0, 2, 2, 1]
    trace = poutine.trace(poutine.condition(model.model, data=chosen)).get_trace(x)
    mean = trace.nodes["x"]["fn"].mean
    assert mean.std() > 0.01
    assert torch.allclose(model.render(scene), mean.clamp(0, 1), atol=1e-5)
    # Centres are where the windows' middles are.
    half = torch.tensor([10.0, 6.0])
    for t in range(model.steps):
        where = half * (model.pose(chosen[f"z_where_{t}"])[3] + 1)
        here = scene.present[:, t]
        assert torch.allclose(scene.where[here, t], where[here], atol=1e-4)


def test_scenes_of_air_by_hand() -> None:
    config = AIRConfig(latent=2, encoder_hidden=(5,), scale_mean=0.25, **SIZES)
    model = worked(AIR(config, (1, 32, 32)), [FRAME])
    objects = [[(9, 11, FRAME), (23, 21, FRAME)], [], [(15, 19, FRAME)]]
    x = torch.stack([painted((32, 32), row) for row in objects])
    scene = model.infer(x)
    assert scene.counts.tolist() == [2, 0, 1] and scene.kind is None
    assert scene.what.shape == (3, 3, 2) and not scene.what[~scene.present].any()
    for b, row in enumerate(objects):
        found = sorted(scene.boxes[b][scene.present[b]].tolist())
        expected = [[column, line, 8, 8] for column, line, _ in sorted(row, key=_place)]
        assert np.allclose(found, expected, atol=0.1)
    assert torch.allclose(model.render(scene), x, atol=0.05)


def test_the_limit_of_objects() -> None:
    model = sorting()
    x = painted((32, 32), [(9, 11, FRAME), (23, 21, CROSS)])[None]
    with pytest.raises(UserError, match="shows 2 objects, more than the limit of 1.*--max-objects"):
        model.infer(x, limit=1)
    assert model.infer(x, limit=2).counts.tolist() == [2]
    assert model.infer(x, limit=math.inf).counts.tolist() == [2]
    assert model.most == 3


def test_unknown_categories_are_refused() -> None:
    model = sorting()
    scene = model.infer(painted((32, 32), [(9, 11, FRAME), (23, 21, CROSS)])[None])
    sprites = model.sprites(scene)
    assert sprites.shape == (1, 3, 1, 8, 8) and not sprites[0, 2].any()
    first, second = scene.kind[0, :2].argsort().tolist()
    assert torch.equal(sprites[0, first, 0], FRAME) and torch.equal(sprites[0, second, 0], CROSS)
    with pytest.raises(UserError, match="category 2; the model knows 0 to 1"):
        model.render(replace(scene, kind=scene.kind + 1))


@pytest.mark.parametrize("shape", [(1, 9, 8), (1, 8, 16), (3, 8, 8)])
def test_images_of_other_sizes_are_refused(model, shape) -> None:
    x = torch.rand(2, *shape)
    for use in (model.infer, model.guide, model.check):
        with pytest.raises(UserError, match="reads images of"):
            use(x)


@pytest.mark.parametrize("build", [
    lambda: AIR(AIRConfig(networks="slow"), SHAPE),
    lambda: DiscreteAIR(DiscreteAIRConfig(networks="slow"), SHAPE),
    lambda: DiscreteAIR(DiscreteAIRConfig(combine="divide"), SHAPE),
])
def test_unknown_networks_are_refused(build: Callable[[], Attend]) -> None:
    with pytest.raises(UserError, match="networks must be fast or paper"):
        build()


@pytest.mark.parametrize("empty", [True, False])
def test_scenes_without_objects(model, empty) -> None:
    model.presence_head.weight.data.zero_()
    model.presence_head.bias.data.fill_(-1e3 if empty else 1e3)
    scene, most = model.infer(torch.rand(2, *SHAPE)), model.steps
    assert scene.counts.tolist() == [0 if empty else most] * 2
    assert model.layers(scene).shape == (2, most, *SHAPE)
    assert (model.render(scene) == 0).all() == empty
    assert (model.segment(scene) == 0).all() or not empty
    assert scene.to_json()[0]["count"] == (0 if empty else most)


class Middle(nn.Module):
    """Where to look, whatever is left to explain."""

    def forward(self, left: Tensor, found: list[Tensor]) -> Tensor:
        return torch.zeros(len(left), 2)


def across() -> list[Tensor]:
    """x and y, (24, 24) each, from -1 to 1."""
    return list(torch.meshgrid(*[(torch.arange(24) + 0.5) / 12 - 1] * 2, indexing="xy"))


def two_spots() -> Tensor:
    """A picture, (24, 24), that looks different after any turn."""
    x, y = across()
    return torch.exp(-8 * (x**2 + y**2)) + torch.exp(-20 * ((x - 0.5)**2 + y**2))


def test_a_turned_object_is_found_turned() -> None:
    x, y = across()
    flag = 0.9 * two_spots() + 0.6 * torch.exp(-20 * ((x + 0.1)**2 + (y - 0.5)**2))
    config = replace(
        SORTING, angles=36, window=24, scale_least=0.5, scale_most=0.5, blur=4.0, max_objects=1
    )
    model = sorting(config, [flag, flag.flip(0)])  # no turn takes one to the other
    angle = torch.tensor([-2.5, -1.0, 0.0, 0.4, 1.9, 3.0])
    scale, place = torch.full((6, 2), 0.5), torch.zeros(6, 2)
    x = warp(flag.expand(6, 1, 24, 24), to_window(scale, angle, 0 * scale, place), (32, 32))
    setattr(model, "peak", Middle())  # the peak of a flag's ink is not its window's middle
    scene = model.infer(x)
    assert scene.counts.tolist() == [1] * 6 and scene.kind.tolist() == [[0]] * 6
    off = torch.remainder(scene.pose[:, 0, 2] - angle + math.pi, 2 * math.pi) - math.pi
    assert off.abs().max() < math.radians(3)
    assert (model.render(scene) - x).abs().max() < 0.1


@pytest.mark.parametrize("looks", [1, 2])
def test_further_looks_are_at_an_object_stood_upright(looks) -> None:
    """By the pose that the looks before give, in the end the true one; and they tell the pose."""
    flag = two_spots()
    config = replace(
        SORTING, looks=looks, glimpse=24, window=24, scale_least=0.3, scale_most=0.7,
        isotropic=False, shear=True, attributes=1, max_objects=1,
    )
    model = worked(DiscreteAIR(config, (1, 64, 64)), [flag, 0.5 * flag])
    assert isinstance(model, DiscreteAIR)
    setattr(model, "peak", Middle())
    where = torch.tensor([0.4, -0.7, 0.3, 0.1, -0.2, 0.5, -0.4])
    with torch.no_grad():
        # Translations are by short steps from the middle.
        model.where_head.bias[:7] = where * torch.tensor([1, 1, 1, 5, 5, 1, 1])
        if model.again_head is not None:  # half of it is left to the look upright
            model.where_head.bias[:7] *= 0.5
            model.again_head.bias.copy_(model.where_head.bias)
    seen: list[Tensor] = []
    assert model.upright is not None
    model.upright.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    image = model.write(flag[None, None], where[None], (64, 64))
    found = sites(model.guide, image, {"z_pres_0": torch.tensor([[0.0, 1.0]])})
    assert len(seen) == looks
    assert all((other - flag).abs().max() > 0.1 for other in (*seen[:-1], seen[-1].flip(-1)))
    assert (seen[-1] - flag).abs().max() < 0.1
    assert torch.allclose(found["z_where_0"]["fn"].mean, where, atol=1e-5)
    with torch.no_grad():
        assert model.category_head is not None
        features = model.category_head.in_features - model.where_head.in_features
        model.category_head.weight[:, -features:] = 0.1
    moved = sites(model.guide, image, {"z_pres_0": torch.tensor([[0.0, 1.0]])})
    assert (moved["z_where_0"]["fn"].mean - where).abs().min() > 1e-3


@pytest.mark.parametrize("gap, off", [(5, 0.4), (6, 0.1), (7, 0.2), (9, 0.1)])
def test_objects_that_touch_are_looked_at_apart(gap, off) -> None:
    """The peak of the ink of both lies between them; what is found there is another shape.

    The pair comes second: looks apart are taken of some rows of a batch alone.
    """
    pair = painted((32, 32), [(11, 15, FRAME), (11 + gap, 15, CROSS)]).clamp(max=1)
    x = torch.stack([painted((32, 32), [(11, 15, FRAME)]), pair])
    found, trained = {}, []
    for rounds in (0, 1, 2):
        model = sorting(replace(SORTING, max_objects=2, blur=4.0, rounds=rounds))
        found[rounds] = scene = model.infer(x)
        assert scene.counts.tolist() == [1, 2] and scene.kind[0].tolist() == [0, -1]
        if rounds:
            assert scene.kind[1].tolist() == [0, 1]
            assert scene.where[1, 0].tolist() == pytest.approx([11, 15], abs=off)
        # A training looks once, whatever the rounds.
        model.temperature = 0.5
        torch.manual_seed(0)
        trained.append(sites(model.guide, x, {})["z_where_0"]["fn"].mean)
        assert torch.equal(trained[-1], trained[0])
    assert abs(found[0].where[1, 0, 0] - 11) > 1
    assert gap < 7 or found[0].kind[1, 0] == 1
    assert torch.equal(found[0].where[0, :1], found[2].where[0, :1])


def test_the_guide_asks_the_model_for_the_category() -> None:
    """Logits differ by what drawing the one or the other adds to the likelihood of the image."""
    model = sorting(replace(SORTING, sigma=0.5), [FRAME, 0.5 * CROSS])
    x = painted((32, 32), [(9, 11, 0.6 * FRAME), (23, 21, 0.8 * CROSS)])[None]
    here = {"z_pres_0": torch.tensor([[0.0, 1.0]])}
    site = sites(model.guide, x, here)["z_cat_0"]
    column, row = ((model.peak(x, [])[0] + 1) * 16).round().tolist()
    assert (column, row) in [(9, 11), (23, 21)]
    costs = []
    for shape in (FRAME, 0.5 * CROSS):
        canvas = painted((32, 32), [(int(column), int(row), shape)])
        costs.append(torch.distributions.Normal(canvas, 0.5).log_prob(x[0]).sum().item())
    logits = site["fn"].logits[0].tolist()
    assert abs(costs[0] - costs[1]) > 1
    assert logits[0] - logits[1] == pytest.approx(costs[0] - costs[1], rel=1e-2)


def test_an_evaluation_counts_what_a_category_adds_among_the_pixels_it_is_drawn_on() -> None:
    """Exactly; a training in the window, whose cells are no pixels."""
    config = replace(
        SORTING, max_objects=1, sigma=0.5, scale_least=0.37, scale_most=0.37, angles=0)
    x = painted((32, 32), [(14, 17, 0.6 * FRAME + 0.2 * CROSS)])[None]
    here = {"z_pres_0": torch.tensor([[0.0, 1.0]])}
    for rounds, most in ((0, math.inf), (1, 1e-3)):
        model = sorting(replace(config, rounds=rounds), [FRAME, 0.5 * CROSS])
        drawn = sites(model.guide, x, here)
        where = drawn["z_where_0"]["fn"].mean.detach().expand(2, -1)
        canvas = model.write(torch.stack([FRAME, 0.5 * CROSS])[:, None], where, (32, 32))
        costs = torch.distributions.Normal(canvas, 0.5).log_prob(x).sum((1, 2, 3))
        logits = drawn["z_cat_0"]["fn"].logits[0]
        off = float((logits[0] - logits[1] - (costs[0] - costs[1])).abs())
        assert abs(costs[0] - costs[1]) > 1 and off < most
        assert rounds or off > 0.1


def test_what_an_object_draws_beyond_the_canvas_counts_as_ink_that_is_not_there() -> None:
    """Else it would cost nothing to see one just outside an empty image."""
    config = replace(SORTING, sigma=0.5, rounds=1)
    model = sorting(config, [FRAME, 0.5 * CROSS])
    black = torch.zeros(1, 1, 32, 32)
    for across in (0.0, 1.0, 1.125, 2.0):  # of half the image: within, half outside, more, all
        where = torch.zeros(1, 2, 5)
        where[..., 3] = across / SPREAD
        found = model._gain(black, model.templates(torch.eye(2), None), where)
        inks = [shape.square().sum() for shape in (FRAME, 0.5 * CROSS)]
        assert torch.allclose(found, -torch.stack(inks)[None] / (2 * 0.5**2), rtol=1e-3)


# --- categories that are hardly used -------------------------------------------------------------


def used(*shares: float) -> Tensor:
    return torch.tensor(shares)


def test_a_category_that_is_hardly_used_is_given_more_each_step_until_it_is_used() -> None:
    rescue = Rescue(classes=4, rate=0.5, balance=0.0)
    for _ in range(300):  # the running mean forgets that all began alike
        rescue(used(5.0, 3.0, 2.0, 0.0))
    before = rescue.start.clone()
    assert before[3] > 50.0 and torch.equal(before[:3], torch.zeros(3))
    rescue(used(5.0, 3.0, 2.0, 0.0))
    assert torch.allclose(rescue.start[3], before[3] + 0.5)
    for _ in range(600):
        rescue(used(1.0, 1.0, 1.0, 1.0))
    assert rescue.start.max() < 0.1


def test_balance_takes_from_what_is_used_twice_its_share() -> None:
    rescue = Rescue(classes=2, rate=0.0, balance=0.25)
    rescue.usage.copy_(torch.tensor([1.0, 0.0]))
    rescue(used(1.0, 0.0))
    assert torch.allclose(rescue.start, torch.tensor([-0.25, 0.25]))


def test_categories_that_are_used_seldom_become_twins_of_those_that_are_used_often() -> None:
    rescue = Rescue(classes=5, rate=0.5, balance=0.0)
    rescue.start.fill_(3.0)
    rescue.usage.copy_(torch.tensor([0.1, 0.6, 0.17, 0.0, 0.13]))  # 0.2 is fair
    assert list(rescue.twins()) == [(1, 3), (1, 0)]
    assert torch.allclose(rescue.usage, torch.tensor([0.15, 0.15, 0.17, 0.3, 0.13]))
    assert rescue.start.tolist() == [0.0, 0.0, 3.0, 0.0, 3.0]


@pytest.mark.parametrize("usage", [[0.29, 0.29, 0.29, 0.13], [0.5, 0.18, 0.16, 0.16]])
def test_categories_that_serve_one_kind_each_have_no_twins(usage) -> None:
    """Of a frequent kind and a rare one."""
    rescue = Rescue(classes=4, rate=0.5, balance=0.0)
    rescue.usage.copy_(torch.tensor(usage))
    assert not list(rescue.twins()) and rescue.usage.tolist() == pytest.approx(usage)


@pytest.mark.parametrize("seed", range(5))
def test_twins_part_what_one_category_was_for(seed) -> None:
    """Where kinds differ by plus and minus something from a template, each gets a twin."""
    model = DiscreteAIR(replace(DISCRETE, classes=3), SHAPE)
    nn.init.normal_(model.category_head.weight)
    kinds = torch.eye(3)
    before, code = model.templates(kinds, None), model.template.weight.clone()
    model.split(1, 2, seed)
    after = model.templates(kinds, None)
    assert torch.equal(after[0], before[0])
    assert torch.allclose(model.template.weight[:, 1:].mean(-1), code[:, 1], atol=1e-6)
    assert 0 < (model.template.weight[:, 1] - code[:, 1]).std() < 0.1 * code[:, 1].std()
    for head in (model.category_head, model.attributes_head):
        for values in head.parameters():
            assert torch.equal(*values.unflatten(0, (3, -1))[1:])
    residual = 0.1 * torch.randn(20, *before.shape[1:])
    worth = [
        gain(before[1] + sign * residual, after[1], torch.ones(20), 0.3)
        - gain(before[1] + sign * residual, after[2], torch.ones(20), 0.3) for sign in (1, -1)
    ]
    assert torch.allclose(worth[0], -worth[1], rtol=0.1, atol=1e-2 * worth[0].abs().max().item())


@pytest.mark.parametrize("config", [DISCRETE, DISCRETE_PAPER])
def test_an_objective_splits_fast_categories_until_attributes_count(config, monkeypatch) -> None:
    model, asked = DiscreteAIR(replace(config, classes=3), SHAPE), []
    monkeypatch.setattr(model, "split", lambda *pair, seed: asked.append((pair, seed)))
    objective = DiscreteAIRObjective(DiscreteAIRSchedule(twin=2), model, 8)
    for step in range(8):  # of which half are without attributes
        objective.rescue.usage.copy_(torch.tensor([0.2, 0.8, 0.0]))
        objective.loss(model, torch.rand(2, *SHAPE), step)
    fast = [((1, 2), 3), ((1, 2), 9)]
    assert asked == (fast if config is DISCRETE else [])


def test_a_batch_without_objects_teaches_nothing_of_use() -> None:
    rescue = Rescue(classes=2, rate=1.0, balance=0.0)
    rescue(torch.zeros(2))
    assert torch.equal(rescue.usage, torch.full((2,), 0.5)) and not rescue.start.any()


def test_the_start_of_a_category_decides_between_equals_and_ends_with_the_step() -> None:
    model = DiscreteAIR(replace(DISCRETE, attributes=0), SHAPE)
    objective = DiscreteAIRObjective(DiscreteAIRSchedule(rescue=1.0), model, 10)
    objective.rescue.start.copy_(torch.tensor([0.0, 1e4]))
    seen: list[Tensor] = []
    guide = model.guide

    def watched(x: Tensor) -> list[dict[str, Tensor]]:
        found = guide(x)
        seen.extend(step["z_cat"] for step in found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiscreteAIR, "guide", lambda self, x: watched(x))
        objective.backward(model, torch.rand(16, *SHAPE), 0)
    assert seen and all(torch.equal(z.argmax(-1), torch.ones(16).long()) for z in seen)
    assert model.start is None


@pytest.mark.parametrize("steps, first", [(10, 5), (6, 3)])
def test_attributes_count_from_the_step_that_is_set_or_half_way(steps: int, first: int) -> None:
    model = DiscreteAIR(DISCRETE, SHAPE)
    objective = DiscreteAIRObjective(DiscreteAIRSchedule(attributes_from=5), model, steps)
    for step, trained in ((first - 1, False), (first, True)):
        model.zero_grad()
        objective.backward(model, torch.rand(16, *SHAPE), step)
        assert model.attribute is not None
        gradient = model.attribute.weight.grad
        assert (gradient is not None and bool(gradient.any())) == trained
    assert model.attributes_on == 1.0


# --- settings ------------------------------------------------------------------------------------


def test_presets_suit_the_data() -> None:
    sprites, digits = (make_config("discrete-air", data) for data in
                       ("multi-sprites", "multi-mnist"))
    assert (sprites.net.classes, sprites.net.attributes, sprites.net.max_objects) == (3, 0, 3)
    assert (digits.net.classes, digits.net.attributes, digits.net.max_objects) == (10, 8, 2)
    binary = make_config("discrete-air", "multi-mnist-10k").net
    assert (binary.classes, binary.attributes, binary.max_objects) == (10, 8, 3)
    assert (binary.combine, binary.likelihood) == (digits.net.combine, "bernoulli")
    colours = make_config("discrete-air", "multi-dsprites")
    assert (colours.net.classes, colours.net.contrast, colours.schedule.twin) == (21, True, 100)
    for data, preset in itertools.product(
        ("multi-dsprites", "multi-mnist-1k", "multi-mnist-10k"), ("fast", "paper")
    ):
        found = [make_config(name, data, preset).net for name in ("air", "discrete-air")]
        assert [net.likelihood for net in found] == ["bernoulli"] * 2
        assert [net.max_objects for net in found] == [3, 3]
        assert found[1].classes == (21 if data == "multi-dsprites" else 10)
    for model, preset in itertools.product(("lavae", "conv-vae"), ("fast", "paper")):
        assert make_config(model, "multi-sprites", preset).net.likelihood == "normal"
        assert make_config(model, "multi-dsprites", preset).net.likelihood == "bernoulli"
    paper = make_config("discrete-air", "multi-mnist", "paper").net
    assert (paper.classes, paper.attributes, paper.combine, paper.max_objects) == (10, 1, "add", 2)
    assert digits.train.steps != sprites.train.steps
    # Digits begin in balance.
    assert (sprites.schedule.twin, digits.schedule.twin, digits.schedule.balance) == (100, 0, 0.1)
    assert digits.schedule.attributes_from == 2000
    changed = make_config("discrete-air", "multi-mnist", settings=["classes=12"], steps=7)
    assert changed.net.classes == 12 and changed.train.steps == 7
    assert make_config("air", "multi-mnist", "paper").net.max_objects == 2


@pytest.mark.parametrize("setting", ["networks=big", "combine=divide", "likelihood=poisson"])
def test_settings_that_there_are_not_are_refused(setting) -> None:
    config = make_config("discrete-air", "multi-sprites", settings=[setting])
    with pytest.raises(UserError, match=setting.split("=")[0]):
        DiscreteAIR(config.net, (1, 64, 64))


@pytest.mark.parametrize("name", ["lavae", "conv-vae"])
def test_so_are_other_models_likelihoods(name) -> None:
    config = make_config(name, "multi-sprites", settings=["likelihood=poisson"])
    with pytest.raises(UserError, match="normal or bernoulli, not 'poisson'"):
        checkpoint.build(config, (1, 64, 64))
