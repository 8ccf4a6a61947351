"""The end of LAVAE's training: places at rest, and a prior of appearances that was fitted."""

from dataclasses import replace
from pathlib import Path

import pyro
import pytest
import torch
from test_lavae import CONFIG
from torch import Tensor

from pyro_scenes import checkpoint, swaps
from pyro_scenes.config import make_config
from pyro_scenes.models.lavae import LAVAE
from pyro_scenes.objectives.base import Weighted
from pyro_scenes.objectives.lavae import LAVAEObjective, LAVAESchedule
from pyro_scenes.training import Run, train

SIZE = (3, 24, 28)
TINY = (
    "batch_size=4", "location_width=8", "location_blocks=1", "appearance_width=4",
    "appearance_hidden=8", "sprite_hidden=8", "latent=3", "log_every=1", "eval_images=4",
    "rest_from=0.5", "fit_from=0.75", "dreams=1", "appearance_prior=mixture:5",
    "appearance_beta=0.1", "warmup_full=2", "warmup_end=3",
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def learning(steps: int = 100, **changes) -> tuple[LAVAEObjective, LAVAE, Tensor]:
    model = LAVAE(replace(CONFIG, appearance_prior="mixture:4", count_threshold=0.01), SIZE)
    schedule = LAVAESchedule(warmup_full=0, warmup_end=0, one_object_left=1.0, **changes)
    return LAVAEObjective(schedule, model, steps), model, (torch.rand(6, *SIZE) < 0.2).float()


def taught(objective: LAVAEObjective, model: LAVAE, x: Tensor, step: int) -> set[str]:
    """The parts of the model that a step gives gradients to."""
    model.zero_grad()
    with pyro.validation_enabled(False):
        objective.backward(model, x, step)
    return {name.split(".")[0] for name, p in model.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0}


def test_what_learns_when() -> None:
    objective, model, x = learning(dreams=10, rest_from=0.6, fit_from=0.8)
    assert (objective.resting, objective.dreaming, objective.fits) == (60, 70, 80)
    appearance = {"appearance_net", "sprite_net"}
    for step in (0, 59):
        assert taught(objective, model, x, step) >= appearance | {"location_net"}
        assert "appearance_prior" not in taught(objective, model, x, step)
    for step in (60, 69):
        assert taught(objective, model, x, step) >= appearance
        assert not {"location_net", "appearance_prior"} & taught(objective, model, x, step)
    for step in (70, 79):
        assert taught(objective, model, x, step) == {"location_net"}
    for step in (80, 99):
        assert taught(objective, model, x, step) >= appearance | {"appearance_prior"}
        assert "location_net" not in taught(objective, model, x, step)


def test_rates_go_on_falling_while_places_rest() -> None:
    objective, _, _ = learning(
        dreams=10, rest_from=0.6, fit_from=0.8, ramp=0, decay_from=0.0, dream_learning_rate=0.5)
    rates = [objective.learning_rates(step) for step in range(100)]
    assert rates[59]["location"] == pytest.approx(0.01 * 1e-3, rel=0.2)
    assert rates[70]["location"] == 0.5 and rates[79]["location"] < 0.05
    appearance = [rate["rest"] for rate in rates]
    assert appearance == sorted(appearance, reverse=True)
    assert appearance[50] == pytest.approx(0.505 * 5e-3, rel=1e-3) and appearance[99] < 1e-4


def test_a_prior_is_fitted_in_a_short_training_too() -> None:
    objective, _, _ = learning(fit_from=0.999)  # of 100 steps
    assert objective.fits == 99 and set(objective.events) == {99}


def test_without_a_phase_of_rest_all_is_as_before() -> None:
    objective, model, x = learning()
    assert objective.fits is None and not objective.rests(99) and not objective.rests(100)
    for step in (0, 99, 100):
        assert taught(objective, model, x, step) >= {"location_net", "appearance_prior"}


def test_the_divergence_of_appearances_weighs_less_while_places_rest_before_the_fit() -> None:
    """-log p(x | z) and the rest of the divergence stay what they are."""
    losses = {}
    for beta in (1.0, 0.25, 0.0):
        torch.manual_seed(1)
        objective, model, x = learning(rest_from=0.5, fit_from=0.8, appearance_beta=beta)
        model.eval()
        for step in (0, 60, 90):
            torch.manual_seed(2)
            losses[beta, step] = objective.loss(model, x, step)[1]["loss"]
    assert losses[0.25, 0] == losses[1.0, 0] and losses[0.25, 90] == losses[1.0, 90]
    part = losses[1.0, 60] - losses[0.0, 60]
    assert abs(part) > 0.01
    assert losses[0.25, 60] - losses[0.0, 60] == pytest.approx(0.25 * part, rel=1e-3)


def test_a_weight_is_of_all_objects_and_of_no_other_site() -> None:
    for name, scale in (("z_app_0", 0.5), ("z_app_12", 0.5), ("z_app", 0.5), ("z_loc_0", 1.0)):
        message = {"name": name, "scale": 1.0}
        Weighted("z_app", 0.5)._pyro_sample(message)
        assert message["scale"] == scale


def test_a_run_fits_the_prior_once_to_scenes_of_the_training(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    look = swaps.look

    def looked(model, scenes, progress):
        seen.append((len(scenes), model.training, model.appearance_prior.means.clone()))
        return look(model, scenes, progress)

    monkeypatch.setattr(swaps, "look", looked)
    config = make_config("lavae", "multi-dsprites", settings=TINY, steps=8)
    run = Run(config, "cpu")
    run.model.appearance_prior.scenes = 50
    start = run.model.appearance_prior.means.clone()
    with pyro.validation_enabled(False):
        for step in range(8):
            assert len(seen) == (step > 6)
            run.advance()
    (images, training, before), = seen
    assert images == 50 and not training and torch.equal(before, start)
    assert not torch.allclose(run.model.appearance_prior.means, start, atol=0.05)


def test_networks_of_appearance_may_begin_again() -> None:
    settings = [name for name in TINY if name != "dreams=1"]
    config = make_config(
        "lavae", "multi-dsprites", settings=(*settings, "appearance_anew=true"), steps=8, seed=3)
    run = Run(config, "cpu")
    assert sorted(run.objective.events) == [4, 6]
    starts = {k: v.clone() for k, v in run.model.state_dict().items()}
    renewed: list[dict[str, Tensor]] = []
    renew = run.model.renew

    def spied() -> None:
        before = {k: v.clone() for k, v in run.model.state_dict().items()}
        renew()
        renewed.append(before)
        renewed.append({k: v.clone() for k, v in run.model.state_dict().items()})

    run.model.renew = spied
    with pyro.validation_enabled(False):
        for _ in range(8):
            run.advance()
    before, after = renewed
    for name, value in after.items():
        anew = name.split(".")[0] in ("sprite_net", "appearance_net")
        assert torch.equal(value, before[name]) == (not anew), name
        if anew and "weight" in name:  # as at the start, though not the same
            assert value.std() == pytest.approx(starts[name].std(), rel=0.5)
            assert not torch.equal(value, starts[name])
    assert torch.equal(
        after["sprite_net.net.2.bias"], torch.full_like(after["sprite_net.net.2.bias"], -2.0))


def test_a_run_that_was_stopped_at_the_fit_ends_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_scenes.priors.SCENES", 60)
    config = make_config(
        "lavae", "multi-dsprites", settings=(*TINY, "checkpoint_every=1"), steps=8)
    train(config, tmp_path / "whole", device="cpu", progress=False)

    for stop in (6, 7):
        out = tmp_path / f"stopped-{stop}"
        save = Run.save
        stopped: list[int] = []

        def saved(self: Run, folder: Path) -> None:
            save(self, folder)
            if self.step == stop and not stopped:
                stopped.append(stop)
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "save", saved)
            train(config, out, device="cpu", progress=False)
        train(config, out, device="cpu", progress=False, resume=True)
        whole, again = (
            checkpoint.load(tmp_path / name).model.state_dict() for name in ("whole", out.name))
        assert all(torch.equal(value, again[name]) for name, value in whole.items())
