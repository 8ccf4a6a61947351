"""The contract of every model: sites, shapes, gradients, independence, no side effects.

A new model gets a row of ``TABLE``.
"""

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pyro
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from test_conv_vae import informed
from torch import Tensor, nn

from pyro_scenes import bounds, evaluate, metrics
from pyro_scenes.data import SceneData
from pyro_scenes.errors import UserError
from pyro_scenes.models import MODELS, GenerativeModel, SceneModel
from pyro_scenes.models.air import AIR, AIRConfig
from pyro_scenes.models.attend import Attend
from pyro_scenes.models.conv_vae import ConvVAE, ConvVAEConfig
from pyro_scenes.models.discrete_air import DiscreteAIR, DiscreteAIRConfig
from pyro_scenes.models.lavae import LAVAE, LAVAEConfig
from pyro_scenes.objectives import Objective, Schedule
from pyro_scenes.objectives.base import surrogate
from pyro_scenes.priors import UniformCount
from pyro_scenes.scene import Scene

BATCH = 3
SHAPE = (3, 12, 8)
FAST = LAVAEConfig(
    max_objects=3, latent=2, sprite=5, crop=7, location_width=8, location_blocks=1,
    appearance_width=4, appearance_hidden=6, sprite_hidden=(5,), count_window=3, blocked_window=3,
)
PAPER = replace(FAST, networks="paper", sprite_width=6, blocked_window=1, straight_through=False)
DISCRETE = DiscreteAIRConfig(
    max_objects=2, classes=3, attributes=1, window=6, code=5, decoder_hidden=(6,), hidden=7,
    glimpse=8, glimpse_width=2, angles=8,
)
DISCRETE_PAPER = replace(
    DISCRETE, networks="paper", window=32, angles=0, isotropic=False, shear=True,
    combine="multiply",
)
# As discrete-air-multi-mnist is shipped, but for the sizes.
DIGITS = replace(
    DISCRETE, angles=0, isotropic=False, shear=True, straight_through=True, looks=2, rounds=1,
    attribute_least=0.5,
)
DEFORMED = replace(DIGITS, combine="deform", attributes=3)
ATTEND = AIRConfig(
    max_objects=2, latent=2, window=6, decoder_hidden=(5,), encoder_hidden=(6,), hidden=7,
    glimpse=8, glimpse_width=2,
)


def guide_of_two(model: LAVAE) -> Callable[[Tensor], None]:
    """LAVAE's guide with two objects in every image: without any, most networks are not used."""
    def guide(x: Tensor) -> None:
        with model._pyro_context:  # where Pyro is told of the networks that encode, too
            encoded = model.encode(x)
            model.guide(x, replace(encoded, count=torch.full_like(encoded.count, 2)))
    return guide


@dataclass
class Row:
    """A model as the contract is tested on it."""

    build: Callable[[], GenerativeModel]
    guide: Callable[[GenerativeModel], Callable] = lambda model: model.guide  # as in training
    training: dict = field(default_factory=dict)  # attributes that an objective sets
    # Parameters that the ELBO alone does not reach, and why.
    unreached: dict[str, str] = field(default_factory=dict)


# Its weights and biases.
BASELINE = {
    f"baseline.{layer}.{kind}": "a baseline is trained by TraceGraph_ELBO alone"
    for layer in (0, 2) for kind in ("weight", "bias")
}
TABLE = {
    "lavae": Row(lambda: LAVAE(FAST, SHAPE), guide_of_two, {"temperature": 0.5}),
    "lavae, paper's networks": Row(
        lambda: LAVAE(PAPER, SHAPE), guide_of_two, {"temperature": 0.5},
        {"location_net.head.bias": "a softmax does not see a constant"},
    ),
    "lavae, a normal likelihood": Row(
        lambda: LAVAE(replace(FAST, likelihood="normal"), SHAPE), guide_of_two, {"temperature": 0.5}
    ),
    "lavae, a flow for a prior": Row(
        lambda: LAVAE(replace(FAST, appearance_prior="flow:2"), SHAPE), guide_of_two,
        {"temperature": 0.5},
    ),
    "lavae, a mixture for a prior": Row(
        lambda: LAVAE(replace(FAST, appearance_prior="mixture:3"), SHAPE), guide_of_two,
        {"temperature": 0.5},
    ),
    "discrete-air": Row(lambda: DiscreteAIR(DISCRETE, SHAPE), training={"temperature": 0.5}),
    "discrete-air, paper's networks": Row(
        lambda: DiscreteAIR(DISCRETE_PAPER, SHAPE), training={"temperature": 0.5}
    ),
    "discrete-air, as evaluated": Row(lambda: DiscreteAIR(DISCRETE, SHAPE)),
    "discrete-air, digits'": Row(
        lambda: DiscreteAIR(DIGITS, SHAPE), training={"temperature": 0.5}
    ),
    "discrete-air, digits' as evaluated": Row(lambda: DiscreteAIR(DIGITS, SHAPE)),
    "discrete-air, deformed": Row(
        lambda: DiscreteAIR(DEFORMED, SHAPE), training={"temperature": 0.5}
    ),
    "discrete-air, sharpened": Row(
        lambda: DiscreteAIR(replace(DISCRETE, contrast=True), SHAPE), training={"temperature": 0.5}
    ),
    "air": Row(lambda: AIR(ATTEND, SHAPE), unreached=BASELINE),
    "air, sharpened": Row(
        lambda: AIR(replace(ATTEND, contrast=True), SHAPE), unreached=BASELINE
    ),
    "air, paper's networks": Row(
        lambda: AIR(replace(ATTEND, networks="paper"), SHAPE), unreached=BASELINE
    ),
    "conv-vae": Row(lambda: informed(ConvVAE(ConvVAEConfig(2, 2, 8, "fast"), SHAPE))),
    "conv-vae, a normal likelihood": Row(
        lambda: informed(ConvVAE(ConvVAEConfig(2, 2, 8, "fast", "normal"), SHAPE))
    ),
    "conv-vae, paper's networks": Row(lambda: ConvVAE(ConvVAEConfig(8, 2, 8, "paper"), SHAPE)),
    "conv-vae, LAVAE's auxiliary": Row(lambda: ConvVAE(ConvVAEConfig(2, 2, 8), SHAPE)),
    "conv-vae, LAVAE's auxiliary, paper's networks": Row(
        lambda: ConvVAE(ConvVAEConfig(2, 2, 8, "paper-auxiliary"), SHAPE)
    ),
}
SCENES = [name for name, row in TABLE.items() if isinstance(row.build(), SceneModel)]


@pytest.fixture(autouse=True)
def validated() -> Iterator[None]:
    with pyro.validation_enabled(True):
        yield


@pytest.fixture(params=TABLE)
def row(request: pytest.FixtureRequest) -> Row:
    torch.manual_seed(0)
    return TABLE[request.param]


def images(batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(batch, *SHAPE, generator=generator) < 0.2).float()


def scenes() -> SceneData:
    pixels = (images(5).permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    return SceneData.from_images("noise", pixels, counts=np.array([0, 1, 2, 3, 1]))


def built(row: Row, seed: int = 0) -> GenerativeModel:
    torch.manual_seed(seed)
    model = row.build()
    for name, value in row.training.items():
        assert hasattr(model, name)
        setattr(model, name, value)
    return model


def sites(trace: poutine.Trace) -> dict[str, dict]:
    return {
        name: site for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def traces(guide: Callable, model: GenerativeModel, x: Tensor) -> tuple[dict, dict]:
    """The sites of a guide and of the model on the guide's values, with their log_prob."""
    drawn = poutine.trace(guide).get_trace(x)
    joint = poutine.trace(poutine.replay(model.model, trace=drawn)).get_trace(x)
    for trace in (drawn, joint):
        trace.compute_log_prob()
    return sites(drawn), sites(joint)


def density(function: Callable, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """The log density of a model or a guide at given values of its latent sites."""
    trace = poutine.trace(poutine.condition(function, data=values)).get_trace(x)
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in sites(trace).values())


def draw(guide: Callable, x: Tensor) -> dict[str, Tensor]:
    """A guide's values; of those that are made one-hot what they were, which has the density."""
    drawn = {name: site["value"] for name, site in
             sites(poutine.trace(guide).get_trace(x)).items()}
    return {name: getattr(v, "_unquantize", v).detach() for name, v in drawn.items()}


def step(row: Row, model: GenerativeModel, x: Tensor, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    _, loss = surrogate(Trace_ELBO(), model.model, row.guide(model), x)
    loss.backward()
    optimizer.step()


def state(model: GenerativeModel) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, and of the training flag of every module."""
    flags = {f"{name} trains": torch.tensor(m.training) for name, m in model.named_modules()}
    return {k: v.clone() for k, v in model.state_dict().items()} | flags


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_pyros_svi_and_optimisers_train_it_as_torchs_do(row) -> None:
    """By way of Pyro's store of parameters, which nothing else leaves any in."""
    model, other = built(row), built(row)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pyro.get_param_store().scope() as store:
        bounds.iwae(model, images(), 2)
        model.sample(2)
        Objective(Schedule(), model, 1).backward(model, images(), 0)
        model.zero_grad(set_to_none=True)
        assert not store["params"] and len(pyro.get_param_store()) == 0
        adam = pyro.optim.Adam({"lr": 1e-2})
        torch.manual_seed(0)
        model.train()
        SVI(model.model, row.guide(model), adam, Trace_ELBO()).step(images())
    step(row, other, images())
    moved = {name for name, value in model.named_parameters()
             if not torch.equal(value, before[name])}
    assert moved >= before.keys() - row.unreached.keys()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("row", ["lavae", "conv-vae"], indirect=True)
def test_tracegraph_elbo_knows_what_depends_on_what(row) -> None:
    """Where nothing has a score, its gradients are Trace_ELBO's on the same draws."""
    model = built(row)
    gradients = []
    for elbo in (Trace_ELBO(), TraceGraph_ELBO()):
        model.zero_grad()
        torch.manual_seed(0)
        elbo.loss_and_grads(model.model, row.guide(model), images())
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_a_model_inside_another_module_computes(row) -> None:
    class Outer(PyroModule):
        def __init__(self, scenes: GenerativeModel):
            super().__init__()
            self.scenes = scenes

    outer = Outer(built(row).eval())
    assert outer.scenes.sample(2).shape == (2, *SHAPE)
    assert bounds.iwae(outer.scenes, images(), 2).isfinite().all()


def test_every_model_is_in_the_table() -> None:
    assert {*MODELS} <= TABLE.keys(), "add a new model to this file's table"
    for name, (kind, presets, _) in MODELS.items():
        assert type(TABLE[name].build()) is kind and "fast" in presets


# --- sites ---------------------------------------------------------------------------------------


def test_guide_and_model_have_the_same_latent_sites(row) -> None:
    model = built(row)
    drawn, joint = traces(row.guide(model), model, images())
    assert joint.pop("x")["is_observed"]
    assert not any(site["is_observed"] for site in joint.values())
    assert drawn.keys() == joint.keys() and drawn
    for name, site in drawn.items():
        assert site["value"].shape == joint[name]["value"].shape


def test_every_site_has_a_log_prob_per_image(row) -> None:
    model = built(row)
    for found in traces(row.guide(model), model, images()):
        assert {name: site["log_prob"].shape for name, site in found.items()} == {
            name: (BATCH,) for name in found}


def test_sites_have_the_same_masks_scales_and_supports_in_guide_and_model(row) -> None:
    """So that what an object costs in the one it gets back in the other, and nothing is lost."""
    model = built(row)
    drawn, joint = traces(row.guide(model), model, images())
    for name, site in drawn.items():
        other = joint[name]
        masks = [True if s["mask"] is None else s["mask"] for s in (site, other)]
        one, two = (torch.as_tensor(mask).expand(BATCH) for mask in masks)
        assert torch.equal(one, two), name
        assert torch.equal(*(torch.as_tensor(s["scale"]).expand(BATCH)[one] * 1.0
                             for s in (site, other)))
        assert other["fn"].support.check(site["value"])[one].all()
        supports = [str(s["fn"].support) for s in (site, other)]
        if name != "n" and "Mixture" not in supports[1]:  # which have constraints of their own
            assert supports[0] == supports[1]


@pytest.mark.parametrize("particles", [1, 4])
def test_every_site_has_a_log_prob_per_particle(row, particles) -> None:
    model = built(row).eval()
    with pyro.plate("particles", particles, dim=-2):
        both = traces(row.guide(model), model, images())
    for found in both:
        assert {name: site["log_prob"].shape for name, site in found.items()} == {
            name: (particles, BATCH) for name in found}
        assert not any(site["log_prob"].isnan().any() for site in found.values())


def test_a_particle_has_the_density_that_it_has_alone(row) -> None:
    model, x = built(row).eval(), images()
    guide = row.guide(model)
    with pyro.plate("particles", 3, dim=-2):
        values = draw(guide, x)
        totals = [density(function, values, x) for function in (model.model, guide)]
    for total, function in zip(totals, (model.model, guide)):
        assert len(total.flatten().unique()) > BATCH  # the draws do differ
        for k in range(3):
            alone = density(function, {name: value[k] for name, value in values.items()}, x)
            assert torch.allclose(alone, total[k], rtol=1e-4)


def test_permuting_the_images_permutes_the_densities(row) -> None:
    model, x = built(row).eval(), images()
    values, order = draw(row.guide(model), x), torch.tensor([2, 0, 1])
    moved = {name: value[order] for name, value in values.items()}
    for function in (model.model, row.guide(model)):
        before, after = density(function, values, x), density(function, moved, x[order])
        assert torch.allclose(before[order], after, rtol=1e-4)
        assert not torch.allclose(before, after, rtol=1e-2)  # the images do differ


@pytest.mark.parametrize("row", SCENES, indirect=True)
def test_permuting_the_objects_changes_no_joint_density(row) -> None:
    """p(x, z) is of a set of objects; the guide draws them in an order of its own."""
    row = replace(row, training={})
    model, x = replace_encode(built(row)).eval(), images()
    values = draw(model.guide, x)
    for name, value in values.items():
        if name.startswith("z_pres"):  # two objects in all images
            here = torch.ones(BATCH)
            values[name] = here if value.dim() == 1 else torch.stack([1 - here, here], -1)
    moved = dict(values)
    for name in values:
        if name.endswith("_0") and not name.startswith("z_pres"):
            other = f"{name[:-1]}1"
            moved[name], moved[other] = values[other], values[name]
    assert moved.keys() == values.keys() and not same(moved, values)
    before, after = (density(model.model, latents, x) for latents in (values, moved))
    assert torch.allclose(before, after, rtol=1e-5)
    swapped = {name: values[name[:-1] + "1"] if name in ("z_loc_0", "z_where_0") else value
               for name, value in values.items()}  # two objects in one place are another scene
    assert not torch.allclose(density(model.model, swapped, x), before, rtol=1e-5)


# --- training ------------------------------------------------------------------------------------


def test_a_step_moves_every_parameter(row) -> None:
    model = built(row)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert row.unreached.keys() <= before.keys()
    step(row, model, images())
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still - row.unreached.keys() == set()
    assert all(p.isfinite().all() for p in model.parameters())


def test_pyro_is_told_of_the_same_parameters_and_once_in_a_trace(row, monkeypatch) -> None:
    def told() -> Counter[str]:
        names = Counter[str]()

        class Told(Messenger):
            def _pyro_param(self, message: dict) -> None:
                names[message["name"].partition(".")[2]] += 1  # without the model's own

        with Told():
            step(row, built(row), images())  # two traces, of guide and model
        return names

    ours = told()
    monkeypatch.delattr(GenerativeModel, "__getattr__")
    theirs = told()
    assert ours.keys() == theirs.keys() and ours <= theirs
    assert max(ours.values()) <= 2  # Pyro's own: whenever a part is read


def test_two_instances_train_independently(row) -> None:
    pyro.clear_param_store()
    one, other, alone = (built(row) for _ in range(3))
    shared = {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert not shared
    untouched = state(other.train())
    step(row, one, images())
    assert same(state(other), untouched)
    # Trained after another instance, a model gets to where it gets alone.
    step(row, other, images().flip(-1), seed=5)
    step(row, alone, images().flip(-1), seed=5)
    assert same(state(other), state(alone)) and not same(state(other), state(one))
    assert len(pyro.get_param_store()) == 0


def test_parameters_are_in_one_group_each(row) -> None:
    model = built(row)
    grouped = [p for group in model.groups().values() for p in group]
    assert len(grouped) == len(list(model.parameters()))
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}


# --- evaluation ----------------------------------------------------------------------------------


@contextmanager
def unchanged(model: GenerativeModel, random: bool) -> Iterator[None]:
    before, generator = state(model), torch.get_rng_state()
    yield
    assert same(state(model), before)
    if random:
        assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("use, random", [
    (lambda model: bounds.iwae(model, images(), 2), False),
    (lambda model: bounds.log_weights(model, images(), 2), False),
    (lambda model: model.sample(3), False),
    (lambda model: model.reconstruct(images()), True),
    (lambda model: evaluate.look(model, scenes()), True),
    (lambda model: evaluate.evaluate(model, scenes(), particles=2, progress=False), True),
], ids=["iwae", "log_weights", "sample", "reconstruct", "look", "evaluate"])
def test_evaluating_changes_nothing(row, use, random) -> None:
    model = replace_encode(built(row))
    step(row, model, images())  # buffers that are not fresh
    with unchanged(model.eval(), random):
        use(model)
    assert not model.training
    assert pyro.settings.get("validate_distributions_pyro")  # switched off for a while only


def replace_encode(model: GenerativeModel) -> GenerativeModel:
    """Two objects in every image, whatever the untrained networks say."""
    if isinstance(model, LAVAE):
        encode = model.encode
        model.encode = lambda x, probed=None: replace(encode(x), count=torch.full((len(x),), 2))
    elif isinstance(model, Attend):
        model.presence_head.bias.data.fill_(30.0)
    return model


@pytest.mark.parametrize("row", SCENES, indirect=True)
def test_inferring_changes_nothing(row) -> None:
    model = replace_encode(built(row)).eval()
    with unchanged(model, random=True):
        scene = model.infer(images())
        model.render(scene)
        model.segment(scene)
        evaluate.infer(model, scenes())
    again = model.infer(images())
    assert scene.to_json() == again.to_json()


def reordered(scene: Scene, order: list[int]) -> Scene:
    parts = {name: getattr(scene, name) for name in ("where", "boxes", "kind", "what", "pose")}
    moved = {name: None if part is None else part[:, order] for name, part in parts.items()}
    return replace(scene, present=scene.present[:, order], **moved)


@pytest.mark.parametrize("row", SCENES, indirect=True)
def test_permuting_the_objects_of_a_scene_changes_no_picture_and_no_figure(row) -> None:
    model = replace_encode(built(row)).eval()
    scene = model.infer(images())
    order = torch.arange(scene.present.shape[1]).roll(1).tolist()
    moved = reordered(scene, order)
    with torch.no_grad():
        assert torch.allclose(model.render(moved), model.render(scene), atol=1e-6)
        assert torch.allclose(model.layers(moved), model.layers(scene)[:, order], atol=1e-6)
        first, second = (model.segment(s, 0.02) for s in (scene, moved))
    assert torch.equal(moved.counts, scene.counts)
    truth = torch.randint(0, 3, first.shape)
    one, other = (metrics.foreground_ari(truth, s) for s in (first, second))
    assert np.allclose(one, other, equal_nan=True)
    boxes, labels = torch.rand(BATCH, 2, 4) * 8, torch.randint(0, 3, (BATCH, 2))
    kinds = scene.kind if scene.kind is not None else scene.present.long() - 1
    found = [(metrics.category_correspondence(kind, labels),
              metrics.placed_correspondence(kind, labels, metrics.match_by_place(s.boxes, boxes)),
              metrics.purity(kind, labels, metrics.match_by_place(s.boxes, boxes)))
             for kind, s in ((kinds, scene), (kinds[:, order], moved))]
    assert found[0] == found[1]


@pytest.mark.parametrize("row", SCENES, indirect=True)
def test_an_image_is_inferred_among_others_as_alone(row) -> None:
    """Whatever the others are, and however many objects they show."""
    model, x = replace_encode(built(row)).eval(), images(6)
    if isinstance(model, LAVAE):
        encode = model.encode
        model.encode = lambda x, probed=None: replace(
            encode(x), count=1 + (x.sum((1, 2, 3)) > 55).long())
    scene = model.infer(x)
    together, alone = scene.to_json(), [model.infer(x[b:b + 1]).to_json()[0] for b in range(6)]
    assert [found["count"] for found in together] == [found["count"] for found in alone]
    assert {found["count"] for found in together} == ({1, 2} if isinstance(model, LAVAE) else {2})
    for one, other in zip(together, alone):
        for first, second in zip(one["objects"], other["objects"], strict=True):
            for key in first:
                assert np.allclose(first[key], second[key], atol=1e-4), key


def test_permuting_the_images_permutes_reconstructions(row) -> None:
    model, x = replace_encode(built(row)).eval(), images()
    order = torch.tensor([2, 0, 1])
    drawn = model.reconstruct(x)
    assert torch.allclose(model.reconstruct(x[order]), drawn[order], atol=1e-5)


@pytest.mark.parametrize("row", SCENES, indirect=True)
def test_scenes_of_no_images_are_none(row) -> None:
    model = built(row).eval()
    scene = model.infer(images(0))
    some = model.infer(images(2))
    for name in ("present", "where", "boxes", "kind", "what", "pose"):
        none, two = getattr(scene, name), getattr(some, name)
        assert (none is None) == (two is None), name
        assert none is None or none.shape[0] == 0 and none.dim() == two.dim(), name
    assert model.render(scene).shape == (0, *SHAPE)
    assert model.segment(scene).shape == (0, *SHAPE[1:])


def test_samples_and_reconstructions_are_images(row) -> None:
    model = replace_encode(built(row)).eval()
    for drawn, count in ((model.sample(4), 4), (model.reconstruct(images()), BATCH)):
        assert drawn.shape == (count, *SHAPE) and not drawn.requires_grad
        assert ((drawn >= 0) & (drawn <= 1)).all()


def test_images_of_other_channels_are_refused(row) -> None:
    model = built(row)
    with pytest.raises(UserError, match="3 channels"):
        model.check(images()[:, :1])
    with pytest.raises(UserError, match="3 channels"):
        model.check(images()[0])


# --- priors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, arguments", [
    ("model", 1), ("guide", 1), ("reconstruct", 1), ("infer", 1), ("counts", 1), ("render", 1),
    ("layers", 1), ("sprites", 1), ("_attend", 2), ("pose", 1), ("templates", 2),
    ("choose_likeliest", 3),
])
def test_a_model_without_a_method_says_which(method: str, arguments: int) -> None:
    # Scenes are reconstructed by what is inferred and rendered.
    kind = Attend if hasattr(Attend, method) and not hasattr(SceneModel, method) else SceneModel
    kind = GenerativeModel if method == "reconstruct" else kind
    missing = "layers" if method == "render" else method  # whose sum it is
    with pytest.raises(NotImplementedError, match=f"{kind.__name__} has no {missing}"):
        getattr(kind(), method)(*[torch.zeros(1)] * arguments)


def test_images_of_other_values_or_numbers_are_refused(row: Row) -> None:
    model, x = built(row).eval(), images()
    for wrong, message in (
        (255 * x, "from 0 to 255"), (2 * x - 1, "from -1 to 1"), (x / 0, "from nan to nan"),
        ((255 * x).byte(), "not torch.uint8"), (x.double(), "not torch.float64"),
        (x.to("meta"), "images are on meta and the model on cpu"),
    ):
        for method in (model.reconstruct, getattr(model, "infer", model.reconstruct)):
            with pytest.raises(UserError, match=message):
                method(wrong)
    for bound in (bounds.iwae, bounds.log_weights):
        for wrong, message in (
            (x.byte(), "not torch.uint8"), (x.double(), "not torch.float64"),
            (x.to("meta"), "on meta"),
        ):
            with pytest.raises(UserError, match=message):
                bound(model, wrong, 2)
        with pytest.raises(UserError, match="at least 1 particle, not 0"):
            bound(model, x, 0)
        with pytest.raises(UserError, match="no images"):
            bound(model, x[:0], 2)
    with pytest.raises(UserError, match="at least 1 particle, not 0"):
        bounds.measure(model, scenes(), 0)
    model.reconstruct(x + 1e-4)  # rounded


@pytest.mark.parametrize("row", SCENES, indirect=True)
def test_scenes_written_and_read_again_are_drawn_alike(row: Row) -> None:
    model = replace_encode(built(row)).eval()
    assert isinstance(model, SceneModel)
    scene = model.infer(images())
    read = model.compose(json.loads(json.dumps(scene.to_json())))
    assert torch.equal(read.counts, scene.counts)
    assert torch.allclose(model.render(read), model.render(scene), atol=1e-6)
    assert torch.allclose(read.boxes, scene.boxes, atol=1e-4, equal_nan=True)
    wide = model.double().compose(scene.to_json())
    assert model.render(wide).dtype == torch.double
    model.float()
    if isinstance(model, Attend):  # of which nothing but the category has to be said
        size = model.prior("appearance")().event_shape[0]
        entry: dict = {"x": 4.0, "y": 3.0}
        entry |= {"kind": 0} if model.classes else {"what": [0.0] * size}
        pose = model.compose([{"objects": [entry]}]).pose
        assert pose is not None
        scale, angle, shear, _ = model.pose(torch.zeros(model.prior("where")().event_shape))
        assert torch.allclose(pose[0, 0], torch.cat([scale, angle.view(1), shear]))


def test_a_copy_is_trained_apart(row: Row) -> None:
    """In Pyro's store too, which has parameters by the names of their models."""
    model = built(row)
    other = copy.deepcopy(model)

    def step(of: GenerativeModel) -> float:
        torch.manual_seed(0)
        adam = pyro.optim.Adam({"lr": 1e-3})
        return SVI(of.model, row.guide(of), adam, Trace_ELBO()).step(images())

    names = [[name for name, _ in m.named_parameters()] for m in (model, other)]
    assert names[0] == names[1] and type(other) is type(model)
    loss = step(model)
    before = [p.detach().clone() for p in model.parameters()]
    start = [p.detach().clone() for p in other.parameters()]
    assert step(other) == pytest.approx(loss)
    assert all(map(torch.equal, before, model.parameters()))
    assert not all(map(torch.equal, start, other.parameters()))
    assert all(map(torch.allclose, before, other.parameters()))


def test_priors_are_moved_to_where_the_model_is(row: Row) -> None:
    """Where there is no other device, meta stands for one."""
    model = row.build().to("meta")
    for name in [name for name in ("count", "latent") if hasattr(model, f"{name}_prior")]:
        prior = nn.Linear(1, 1)
        with model.priors(**{name: prior}):
            assert model.prior(name) is prior and prior.weight.device.type == "meta"


@pytest.mark.parametrize("row", SCENES, indirect=True)
def test_a_scene_of_another_model_is_refused(row: Row) -> None:
    model = built(row).eval()
    assert isinstance(model, SceneModel)
    scene = Scene(torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, 2), torch.ones(1, 1, 4),
                  what=torch.zeros(1, 1, 77))
    with pytest.raises(UserError, match="pose" if isinstance(model, Attend) else "appearances"):
        model.render(scene)


def test_a_model_of_float64_finds_what_one_of_float32_does(row: Row) -> None:
    model, x = built(row).eval(), images()
    found = model.infer(x, math.inf) if isinstance(model, SceneModel) else model.reconstruct(x)
    model.double()
    if isinstance(model, SceneModel):
        exact = model.infer(x.double(), math.inf)
        assert torch.equal(exact.present, found.present)
        drawn = model.render(exact)
        assert drawn.dtype == torch.float64
        torch.testing.assert_close(drawn.float(), model.float().render(found), atol=1e-4, rtol=1e-4)
        model.double()
    else:
        torch.testing.assert_close(model.reconstruct(x.double()).float(), found, atol=1e-4, rtol=0)
    assert bounds.log_weights(model, x.double(), 2).isfinite().all()


def test_no_images_have_no_reconstruction(row: Row) -> None:
    model = built(row).eval()
    assert model.reconstruct(images()[:0]).shape == (0, *SHAPE)


def test_priors_are_swapped_for_a_while() -> None:
    model = built(TABLE["lavae"])
    before = model.count_prior
    names = [name for name, _ in model.named_parameters()]
    with model.priors(count=UniformCount(2, 3)):
        drawn = poutine.trace(poutine.uncondition(model.model)).get_trace(torch.zeros(200, *SHAPE))
        assert set(drawn.nodes["n"]["value"].tolist()) == {2, 3}
        assert "count_prior.logits" not in dict(model.named_parameters())
    assert model.count_prior is before
    assert [name for name, _ in model.named_parameters()] == names

    with pytest.raises(ZeroDivisionError):
        with model.priors(count=UniformCount(2, 3), appearance=nn.Identity()):
            raise ZeroDivisionError
    assert model.count_prior is before and not isinstance(model.appearance_prior, nn.Identity)


def test_a_prior_that_the_model_does_not_have_is_refused() -> None:
    model = built(TABLE["lavae"])
    before = model.count_prior
    with pytest.raises(UserError, match="'colour'"):
        with model.priors(count=UniformCount(2, 3), colour=nn.Identity()):
            pass
    assert model.count_prior is before
