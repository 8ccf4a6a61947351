"""The plain objective, by which a model is trained that is registered and no more.

And what others weigh and count, by hand; their own schedules are in test_air.py and others.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from test_air import DISCRETE
from torch import Tensor

from pyro_scenes import checkpoint
from pyro_scenes.config import TrainConfig, make_config
from pyro_scenes.data import SceneData, save_npz
from pyro_scenes.models import MODELS
from pyro_scenes.models.conv_vae import ConvVAE, ConvVAEConfig
from pyro_scenes.models.discrete_air import DiscreteAIR
from pyro_scenes.models.lavae import LAVAE, LAVAEConfig
from pyro_scenes.objectives import OBJECTIVES, Objective, Schedule
from pyro_scenes.objectives.air import DiscreteAIRObjective, DiscreteAIRSchedule, Rescue
from pyro_scenes.objectives.base import Weighted
from pyro_scenes.objectives.lavae import LAVAEObjective, LAVAESchedule
from pyro_scenes.training import train

CONFIG = ConvVAEConfig(2, 2, 8, "fast")
SHAPE = (1, 8, 8)
SMALL = LAVAEConfig(
    max_objects=2, latent=2, sprite=5, crop=7, location_width=8, location_blocks=1,
    appearance_width=4, appearance_hidden=6, sprite_hidden=(5,),
)


@pytest.fixture
def model() -> ConvVAE:
    torch.manual_seed(0)
    return ConvVAE(CONFIG, SHAPE)


def test_its_gradient_is_that_of_minus_the_elbo_of_an_image(model: ConvVAE) -> None:
    x = (torch.rand(5, *SHAPE) < 0.3).float()
    torch.manual_seed(1)
    figures = Objective(Schedule(), model, 10).backward(model, x, 0)
    found = [parameter.grad.clone() for parameter in model.parameters()]
    torch.manual_seed(1)
    guide = poutine.trace(model.guide).get_trace(x)
    joint = poutine.trace(poutine.replay(model.model, guide)).get_trace(x)
    loss = (guide.log_prob_sum() - joint.log_prob_sum()) / len(x)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert figures == {"loss": pytest.approx(loss.item(), rel=1e-5)}
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("particles, elbo", [
    (1, TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)),
    (3, Trace_ELBO(num_particles=3)),
])
def test_an_objective_may_have_another_elbo(particles: int, elbo: Any, model: ConvVAE) -> None:
    """Of a model without enumeration it is the mean over draws of what one draw has."""
    x = (torch.rand(5, *SHAPE) < 0.3).float()
    objective, parameters = Objective(Schedule(), model, 10), list(model.parameters())
    torch.manual_seed(1)
    losses = [objective.loss(model, x, 0) for _ in range(particles)]
    mean = torch.stack([loss for loss, _ in losses]).mean()
    expected = torch.autograd.grad(mean, parameters)
    figure = np.mean([figures["loss"] for _, figures in losses])
    objective.elbo = elbo
    torch.manual_seed(1)
    loss, figures = objective.loss(model, x, 0)
    assert figures["loss"] == pytest.approx(figure, rel=1e-4)
    found = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_its_learning_rate_rises_and_falls(model: ConvVAE) -> None:
    schedule = Schedule(learning_rate=2.0, ramp=10, decay_from=0.5, decay_to=0.25)
    objective = Objective(schedule, model, 100)
    rates = [objective.learning_rates(step)["all"] for step in range(101)]
    assert rates[0] < rates[5] < rates[10] == rates[50] == 2.0
    assert rates[75] == pytest.approx(2.0 * (0.25 + 0.75 / 2)) and rates[100] == 0.5
    assert set(objective.learning_rates(0)) == set(model.groups())


def test_a_registered_model_trains_without_more(
    model: ConvVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "plain", (ConvVAE, {"fast": CONFIG, "odd": CONFIG}, {}))
    assert "plain" not in OBJECTIVES
    pixels = np.zeros((8, 8, 8, 1), np.uint8)
    pixels[:, 2:5, 3:6] = 255
    save_npz(tmp_path / "data.npz", SceneData.from_images("squares", pixels))
    data = str(tmp_path / "data.npz")
    for preset in ("fast", "odd"):
        config = make_config("plain", data, preset)
        assert (config.train, config.schedule, config.net) == (TrainConfig(), Schedule(), CONFIG)
    config = make_config(
        "plain", data, settings=("learning_rate=0.01", "ramp=0", "batch_size=4"), steps=20
    )
    assert config.schedule == Schedule(learning_rate=0.01, ramp=0)
    history = train(config, tmp_path / "run", device="cpu", progress=False)
    loss = history["loss"][1]
    assert loss[-1] < loss[0]
    assert isinstance(checkpoint.load(tmp_path / "run").model, ConvVAE)


# --- what others weigh and count -----------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_a_weight_multiplies_the_scale_that_a_site_has(inside: bool) -> None:
    def sites() -> None:
        for name in ("z_app_0", "z_loc_0"):
            pyro.sample(name, dist.Normal(0.0, 1.0), obs=torch.tensor(2.0))

    parts = [poutine.scale(scale=0.25), Weighted("z_app", 0.5)]
    with parts[inside], parts[not inside]:
        trace = poutine.trace(sites).get_trace()
    trace.compute_log_prob()
    log_prob = dist.Normal(0.0, 1.0).log_prob(torch.tensor(2.0))
    assert torch.allclose(trace.nodes["z_app_0"]["log_prob"], 0.125 * log_prob)
    assert torch.allclose(trace.nodes["z_loc_0"]["log_prob"], 0.25 * log_prob)


def test_balance_by_hand() -> None:
    """Shares of 2.8, 0.8, 0.4 and 0 are off by 1 at most, -0.2, -0.6 and -1: -0.2 in the mean."""
    rescue, usage = Rescue(classes=4, rate=1.0, balance=0.25), torch.tensor([0.7, 0.2, 0.1, 0.0])
    rescue.usage.copy_(usage)
    for times in (1, 2):
        rescue(10 * usage)
        expected = times * torch.tensor([-0.3, 0.0, 0.1, 0.2])
        assert torch.allclose(rescue.start, expected, atol=1e-6)
    assert torch.allclose(rescue.usage, usage)


def test_the_use_of_categories_is_that_of_the_objects_that_are_there() -> None:
    torch.manual_seed(0)
    model = DiscreteAIR(DISCRETE, SHAPE)
    objective = DiscreteAIRObjective(DiscreteAIRSchedule(attributes_from=1), model, 10)
    seen: list[dict[str, Tensor]] = []
    guide = DiscreteAIR.guide

    def watched(self: DiscreteAIR, x: Tensor) -> list[dict[str, Tensor]]:
        found = guide(self, x)
        seen.extend(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiscreteAIR, "guide", watched)
        _, figures = objective.loss(model, torch.rand(16, *SHAPE), 0)
        used = torch.stack([step["z_cat"][i] * step["here"][i] for step in seen
                            for i in range(16)]).detach().sum(0)
        usage = 0.98 / model.classes + 0.02 * used / used.sum()
        assert torch.allclose(objective.rescue.usage, usage, atol=1e-6)
        assert usage.max() > usage.min() + 1e-3
        assert figures["least used"] == pytest.approx(usage.min().item())
        objective.loss(model, torch.rand(16, *SHAPE), 1)  # attributes count
    assert torch.allclose(objective.rescue.usage, usage, atol=1e-6)


def test_the_figure_of_a_loss_is_without_the_warm_up() -> None:
    x, found = (torch.rand(4, 1, 16, 16) < 0.2).float(), []
    for weight in (1.0, 2.0):
        torch.manual_seed(0)
        model = LAVAE(SMALL, (1, 16, 16))
        schedule = LAVAESchedule(warmup_full=5, warmup_end=10, warmup_weight=weight)
        objective = LAVAEObjective(schedule, model, 100)
        torch.manual_seed(1)
        found.append(objective.loss(model, x, 0)[1])
    once, twice = found
    assert once["warmup"] > 10 and twice["warmup"] == pytest.approx(2 * once["warmup"])
    assert twice["loss"] == pytest.approx(once["loss"], rel=1e-4)
    assert once["loss"] > 0  # as -log p of what is discrete


def test_a_target_is_lower_where_other_images_have_more_to_find() -> None:
    """The least that counts as a peak is 0.3 of 9.1, the quantile 0.9 of 10 and 1."""
    schedule = LAVAESchedule(warmup_height=3.0, warmup_blur=0.0)
    objective = LAVAEObjective(schedule, LAVAE(SMALL, (1, 16, 16)), 100)
    kl, expected = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    kl[0, 2, 5], kl[1, 4, 4] = 10.0, 1.0
    expected[0, 2, 5], expected[1, 4, 4] = 3.0, 3 * (1 / 2.73) ** 3
    assert torch.allclose(objective.location_target(kl, (8, 8)), expected, rtol=1e-4)
