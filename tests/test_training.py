"""Training: resumed to the bit, refused when settings changed, stopped by a bad loss, and learning.
"""

import copy
import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_scenes import checkpoint, evaluate, report, training
from pyro_scenes.config import RunConfig, TrainConfig, make_config
from pyro_scenes.data import load_npz
from pyro_scenes.errors import UserError
from pyro_scenes.models.conv_vae import ConvVAE, ConvVAEConfig
from pyro_scenes.models.lavae import LAVAE
from pyro_scenes.objectives.base import falling, linear
from pyro_scenes.objectives.lavae import LAVAEObjective, LAVAESchedule
from pyro_scenes.spatial import find_peaks
from pyro_scenes.training import Run, train

# Networks that train in no time, and a schedule whose every phase falls into a few steps.
TINY = (
    "latent=2", "sprite=5", "crop=7", "location_width=8", "location_blocks=1",
    "appearance_width=4", "appearance_hidden=6", "sprite_hidden=6", "max_objects=3",
    "batch_size=4", "log_every=1", "eval_every=3", "eval_images=2", "checkpoint_every=100",
    "ramp=2", "temperature_steps=6", "floor_begin=2", "floor_end=6",
    "one_object=1", "one_object_end=6", "warmup_full=2", "warmup_end=5",
)
STEPS = 8


def scenes(images: int, seed: int = 0, side: int = 16) -> dict[str, Any]:
    """Bright squares of 3 x 3 pixels on black, none to two an image, apart from each other."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((images, side, side, 1), np.uint8)
    counts = random.integers(0, 3, images)
    for image, count in zip(pixels, counts):
        left = True
        for _ in range(count):
            row = random.integers(1, side - 4)
            column = random.integers(1, side // 2 - 4) + (0 if left else side // 2)
            image[row:row + 3, column:column + 3] = 255
            left = False
    return {"images": pixels, "counts": counts}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 images, of which the last is held out: an epoch has 5 steps of 4 images."""
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    np.savez(path, **scenes(24))
    return str(path)


def configured(data: str, *settings: str, steps: int = STEPS, seed: int = 0) -> RunConfig:
    return make_config("lavae", data, settings=TINY + settings, steps=steps, seed=seed)


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory) -> Path:
    """A run of networks that no preset has."""
    out = tmp_path_factory.mktemp("runs") / "begun"
    run(configured(data, "latent=3", steps=3), out)
    return out


def continued(data: str, start: Path, *settings: str, steps: int = 2) -> RunConfig:
    """A run that begins with that one's weights, and says nothing of its networks."""
    own = [setting for setting in TINY if setting.partition("=")[0] in vars(TrainConfig())]
    return make_config("lavae", data, settings=[*own, *settings], steps=steps, start=str(start),
                       net=checkpoint.networks(start, "lavae"))


def run(config: RunConfig, out: Path, **options) -> training.History:
    return train(config, out, device="cpu", progress=False, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def before_step(step: int, act: Callable[[Run], None]) -> Callable[[Run], dict]:
    """Run.advance, which acts first when so many steps are done."""
    advance = Run.advance

    def wrapped(run: Run) -> dict:
        if run.step == step:
            act(run)
        return advance(run)
    return wrapped


# --- interrupted and resumed ---------------------------------------------------------------------


def differences(one: object, two: object, path: str = "") -> list[str]:
    """Where two nested containers of tensors and numbers are not the same to the bit."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [d for key in one for d in differences(one[key], two[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        return [d for i in range(len(one)) for d in differences(one[i], two[i], f"{path}/{i}")]
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return [] if torch.equal(one, two) and one.dtype == two.dtype else [path]
    return [] if type(one) is type(two) and one == two else [path]


def test_differences_are_found() -> None:
    one = {"a": [torch.zeros(2), 1.0], "b": (2,)}
    assert differences(one, copy.deepcopy(one)) == []
    assert differences(one, {"a": [torch.zeros(2) + 1e-45, 1.0], "b": (3,)}) == ["/a/0", "/b/0"]


class Crash(Exception):
    """Stands for a machine that stops."""


def crash(run: Run) -> None:
    raise Crash


@pytest.mark.parametrize("act, error, settings, kept", [
    # Ctrl-C: the step is finished and saved.
    (lambda run: signal.raise_signal(signal.SIGINT), KeyboardInterrupt,
     ("precision=float32",), 5),
    (lambda run: signal.raise_signal(signal.SIGTERM), KeyboardInterrupt,
     ("precision=bfloat16", "optimizer=adamax", "clip=0"), 5),
    # A crash: the last regular checkpoint counts, in the middle of an epoch or at its end.
    (crash, Crash, ("precision=float32", "checkpoint_every=3"), 3),
    (crash, Crash, ("precision=float32", "checkpoint_every=1", "straight_through=false"), 4),
])
def test_a_resumed_run_ends_as_one_that_was_never_interrupted(
    data, tmp_path, monkeypatch, act, error, settings, kept
) -> None:
    config = configured(data, *settings)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    history = run(config, whole)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", before_step(4, act))
        with pytest.raises(error):
            run(config, parts)
    assert checkpoint.read(parts / "checkpoint.pt")["step"] == kept
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    torch.manual_seed(999)  # what a new process would have
    assert differences(run(config, parts, resume=True), history) == []
    one, two = (checkpoint.read(folder / "checkpoint.pt") for folder in (whole, parts))
    assert one["step"] == STEPS
    assert history["loss"][0] + history["surprise"][0] == list(range(1, STEPS + 1))
    for content in (one, two):
        content["training"].pop("seconds")
    assert differences(one, two) == []
    assert files(whole)["history.json"] == files(parts)["history.json"]


def test_training_is_not_the_same_whatever_happens(data, tmp_path) -> None:
    """The comparison above would see another seed."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, out in enumerate(runs):
        run(configured(data, seed=seed), out)
    one, two = (checkpoint.read(out / "checkpoint.pt")["model"] for out in runs)
    moved = differences(one, two)
    assert set(moved) == {f"/{name}" for name in one if not name.endswith("zero")}


def test_resuming_a_finished_run_changes_nothing(data, tmp_path) -> None:
    config = configured(data, steps=3)
    history = run(config, tmp_path)
    before = files(tmp_path)
    assert differences(run(config, tmp_path, resume=True), history) == []
    assert files(tmp_path) == before


def test_resuming_without_a_run_starts_one(data, tmp_path) -> None:
    config = configured(data, steps=2)
    assert len(run(config, tmp_path / "new", resume=True)["loss"][0]) == 2


def test_a_run_begins_with_the_weights_and_networks_of_another(data, begun, tmp_path) -> None:
    """Rates of 0 show what it began with."""
    names = "learning_rate", "location_learning_rate", "prior_learning_rate"
    for rate in ("0", "0.01"):
        run(continued(data, begun, *(f"{name}={rate}" for name in names)), tmp_path / rate)
    theirs, same, moved = (
        checkpoint.load(path) for path in (begun, tmp_path / "0", tmp_path / "0.01")
    )
    assert same.config.net == theirs.config.net and same.config.net.latent == 3
    weights = [name for name, _ in theirs.model.named_parameters()]
    one, two, three = (found.model.state_dict() for found in (theirs, same, moved))
    assert all(torch.equal(one[name], two[name]) for name in weights)
    assert not all(torch.equal(one[name], three[name]) for name in weights)
    assert f"--from {begun}" in same.config.command(0)
    assert "--set latent=3" in same.config.command(0)
    assert "--set sprite=5" in same.config.command(0)
    assert "--from" not in theirs.config.command(0)


def test_such_a_run_goes_on_without_what_it_began_with(data, begun, tmp_path, monkeypatch) -> None:
    start, whole, parts = (tmp_path / name for name in ("start", "whole", "parts"))
    shutil.copytree(begun, start)
    config = continued(data, start, "checkpoint_every=2", steps=4)
    run(config, whole)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", before_step(3, crash))
        with pytest.raises(Crash):
            run(config, parts)
    shutil.rmtree(start)
    run(config, parts, resume=True)
    one, two = (checkpoint.read(folder / "checkpoint.pt") for folder in (whole, parts))
    assert one["step"] == two["step"] == 4
    assert differences(one["model"], two["model"]) == []
    with pytest.raises(UserError, match="no run, file"):
        run(config, tmp_path / "anew")
    assert not (tmp_path / "anew").exists()


@pytest.mark.parametrize("change, name", [
    ({"settings": ("batch_size=5",)}, "train.batch_size"),
    ({"settings": ("latent=3",)}, "net.latent"),
    ({"settings": ("floor=0.02",)}, "schedule.floor"),
    ({"settings": ("sprite_hidden=6,6",)}, "net.sprite_hidden"),
    ({"steps": 9}, "train.steps"),
    ({"seed": 1}, "seed"),
])
def test_resuming_with_changed_settings_is_refused(data, tmp_path, change, name) -> None:
    run(configured(data, steps=2), tmp_path)
    before = files(tmp_path)
    changed = configured(data, *change.get("settings", ()), steps=change.get("steps", 2),
                         seed=change.get("seed", 0))
    with pytest.raises(UserError, match=rf"other settings \({name}\)"):
        run(changed, tmp_path, resume=True)
    assert files(tmp_path) == before


def test_a_run_that_is_there_is_kept_unless_forced(data, tmp_path) -> None:
    run(configured(data, steps=2), tmp_path / "out")
    before = files(tmp_path / "out")
    config = configured(data, steps=2, seed=1)
    with pytest.raises(UserError, match="--resume, --force"):
        run(config, tmp_path / "out")
    assert files(tmp_path / "out") == before
    run(config, tmp_path / "out", force=True)
    run(config, tmp_path / "fresh")
    forced, fresh = (checkpoint.load(tmp_path / name).model for name in ("out", "fresh"))
    assert differences(forced.state_dict(), fresh.state_dict()) == []


def test_a_forced_run_that_stops_early_leaves_nothing_of_the_one_before(
    data, tmp_path, monkeypatch
) -> None:
    run(configured(data, steps=2), tmp_path)
    config = configured(data, steps=2, seed=1)

    def killed(*arguments: object) -> None:
        raise RuntimeError("before the first checkpoint")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(training.Run, "loop", killed)
        run(config, tmp_path, force=True)
    assert set(files(tmp_path)) == {"config.json"}
    run(config, tmp_path, resume=True)
    assert checkpoint.load(tmp_path).config.seed == 1


def test_resuming_on_other_images_is_refused(tmp_path) -> None:
    file, out = tmp_path / "squares.npz", tmp_path / "run"
    np.savez(file, **scenes(24))
    config = configured(str(file), steps=4)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "advance", before_step(2, lambda run: signal.raise_signal(
            signal.SIGINT)))
        run(config, out)
    before = files(out)
    np.savez(file, **scenes(24, seed=1))
    with pytest.raises(UserError, match="other images"):
        run(config, out, resume=True)
    assert files(out) == before
    with pytest.raises(UserError, match="other images"):
        report.held_out(checkpoint.load(out), 5, None)
    file.unlink()
    with pytest.raises(UserError, match="no file is called .* by --data"):
        report.held_out(checkpoint.load(out), 5, None)
    np.savez(file, **scenes(24))
    assert len(run(config, out, resume=True)["loss"][0]) == 4
    assert list(report.held_out(checkpoint.load(out), 5, None)) == ["held out"]


@pytest.mark.parametrize("model, settings, side, said", [
    ("lavae", ("dreams=2", "count_softness=0"), 16, "count_softness"),
    ("lavae", ("appearance_anew=true",), 16, "set rest_from"),
    ("lavae", ("appearance_beta=0.2", "rest_from=0.5"), 16, "set rest_from and fit_from"),
    ("lavae", (), 10, "multiples of 4"),
    ("discrete-air", ("networks=paper", "angles=0", "window=32"), 6, "8 x 8"),
])
def test_what_does_not_go_together_is_said_before_a_run_is_replaced(
    tmp_path, model, settings, side, said
) -> None:
    file, out = tmp_path / "small.npz", tmp_path / "run"
    np.savez(file, images=np.zeros((24, side, side, 1), np.uint8))
    known = tuple(s for s in TINY if s.partition("=")[0] in ("batch_size", "eval_images"))
    settings = (*TINY, *settings) if model == "lavae" else (*known, *settings)
    config = make_config(model, str(file), settings=settings, steps=STEPS)
    out.mkdir()
    (out / "checkpoint.pt").write_bytes(b"an earlier run")
    with pytest.raises(UserError, match=said):
        run(config, out, force=True)
    assert files(out) == {"checkpoint.pt": b"an earlier run"}


def test_the_papers_networks_take_sides_that_are_no_multiples(tmp_path) -> None:
    np.savez(tmp_path / "odd.npz", **scenes(24, side=18))
    config = make_config("lavae", str(tmp_path / "odd.npz"), settings=(
        *TINY, "networks=paper", "sprite_width=6"), steps=2)
    assert all(map(math.isfinite, run(config, tmp_path / "run")["loss"][1]))


def test_weights_alone_cannot_be_resumed(data, tmp_path) -> None:
    config = configured(data, steps=2)
    run(config, tmp_path)
    kept = checkpoint.load(tmp_path)
    checkpoint.save(tmp_path / "checkpoint.pt", config, kept.model, kept.step)
    with pytest.raises(UserError, match="weights only"):
        run(config, tmp_path, resume=True)


# --- a loss that is not finite -------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    data, tmp_path, monkeypatch, value
) -> None:
    config = configured(data, "checkpoint_every=1")
    seen = []

    def poison(run: Run) -> None:
        seen.append((run, files(tmp_path)))
        run.model.count_prior.logits.data[0] = value
        run.model.sprite_net.net[0].weight.data[0] = value

    monkeypatch.setattr(Run, "advance", before_step(4, poison))
    with pytest.raises(UserError, match="loss is not finite at step 5"):
        run(config, tmp_path)
    (stopped, before), = seen
    assert files(tmp_path) == before
    assert stopped.step == 4
    kept = checkpoint.load(tmp_path)
    assert kept.step == 4 and all(p.isfinite().all() for p in kept.model.parameters())


# --- data ----------------------------------------------------------------------------------------


def test_images_alone_are_enough(tmp_path) -> None:
    path = tmp_path / "bare.npz"
    np.savez(path, images=scenes(24)["images"])
    history = run(configured(str(path), steps=3), tmp_path / "out")
    assert history["loss"][0] == [1, 2, 3] and history["held-out -ELBO"][0] == [3]
    assert "count accuracy" not in history
    kept = checkpoint.load(tmp_path / "out")
    assert kept.model.image_shape == (1, 16, 16) and not kept.model.training
    result = evaluate.evaluate(kept.model, load_npz(path)[:4], particles=2, progress=False)
    assert result["nll"] > 0 and result["count_accuracy"] is None


def numbered(path: Path, images: int) -> str:
    """Images that hold their number in binary."""
    pixels = np.zeros((images, 16, 16, 1), np.uint8)
    pixels[:, 0, :8, 0] = np.unpackbits(np.arange(images, dtype=np.uint8)[:, None], axis=1) * 255
    np.savez(path, images=pixels)
    return str(path)


def numbers(x: Tensor) -> list[int]:
    return (x[:, 0, 0, :8] @ 2.0 ** torch.arange(7, -1, -1.0)).long().tolist()


@pytest.mark.parametrize("batch, steps", [(4, 5), (6, 3), (20, 1)])
def test_an_epoch_visits_every_image_once_in_a_new_order(tmp_path, batch, steps) -> None:
    source = numbered(tmp_path / "numbered.npz", 21)  # the last is held out
    first = Run(configured(source, f"batch_size={batch}"), "cpu")
    epochs = []
    for epoch in range(3):
        at = [numbers(first.batch(epoch * steps + i)) for i in range(steps)]
        assert [len(x) for x in at] == [batch] * steps
        epochs.append(sum(at, []))
        seen = set(epochs[-1])
        assert len(seen) == batch * steps and seen <= set(range(20))  # what is left over waits
    assert sorted(epochs[0]) != epochs[0] != epochs[1] != epochs[2]
    # The order follows from seed and step alone.
    again = Run(configured(source, f"batch_size={batch}"), "cpu")
    assert numbers(again.batch(steps)) == epochs[1][:batch]
    other = Run(configured(source, f"batch_size={batch}", seed=1), "cpu")
    assert numbers(other.batch(0)) != epochs[0][:batch]
    assert numbers(first.held_out.batch()) == [20]


@pytest.mark.parametrize("setting, message", [
    ("steps=0", "steps must be at least 1"),
    ("batch_size=0", "batch_size must be at least 1"),
    ("batch_size=24", "batch_size 24 is more than the 23 images"),
    ("checkpoint_every=0", "checkpoint_every must be at least 1"),
    ("optimizer=sgd", "optimizer must be one of adam, adamax"),
    ("precision=half", "precision must be"),
])
def test_bad_settings_are_refused(data, tmp_path, setting, message) -> None:
    with pytest.raises(UserError, match=message):
        run(configured(data, setting) if setting != "steps=0" else configured(data, steps=0),
            tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_configuration_survives_json(data) -> None:
    for config in (configured(data), make_config("lavae", data, "paper", ["sprite_hidden=1,2,3"])):
        assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    begun = replace(config, start="runs/one")
    assert RunConfig.from_dict(json.loads(json.dumps(begun.to_dict()))) == begun != config
    with pytest.raises(UserError, match="start is a name"):
        RunConfig.from_dict(config.to_dict() | {"start": 3})


def test_what_an_older_configuration_lacks_is_at_its_default(data) -> None:
    """Not as the preset has it now: the training did without."""
    config = configured(data)
    assert config.schedule.dreams > 0
    values = config.to_dict()
    del values["schedule"]["dreams"]
    old = RunConfig.from_dict(values)
    assert old.schedule.dreams == 0 and "--set dreams=0" in old.command(0)
    assert replace(old.schedule, dreams=config.schedule.dreams) == config.schedule


def test_steps_train_the_model_and_looks_do_not(data) -> None:
    """Batch normalisation tells: its statistics move in steps, and do not in looks."""
    # One object an image: sprites' statistics move where there are two objects or more.
    trained = Run(
        configured(data, "networks=paper", "sprite_width=6", "precision=float32",
                   "one_object=9", "one_object_end=9"), "cpu",
    )
    tracked = [b for name, b in trained.model.named_buffers() if name.endswith("tracked")]
    assert tracked and all(b == 0 for b in tracked)
    for step in (1, 2):
        trained.advance()
        assert all(b == step for b in tracked)
        trained.look()
        assert all(b == step for b in tracked) and not trained.model.training


# --- learning ------------------------------------------------------------------------------------


def test_a_short_training_learns(tmp_path) -> None:
    """Squares on 24 x 24 pixels: within 200 steps they are counted and drawn."""
    content = scenes(2000, side=24)
    np.savez(tmp_path / "squares.npz", **content)
    config = make_config("lavae", str(tmp_path / "squares.npz"), settings=(
        "latent=2", "sprite=5", "crop=7", "location_width=16", "location_blocks=1",
        "appearance_width=8", "appearance_hidden=16", "sprite_hidden=16", "max_objects=3",
        "count_window=5", "blocked_window=5", "likelihood_floor=1e-3", "batch_size=32",
        "precision=float32", "eval_every=20", "eval_images=100",
        "learning_rate=1e-2", "location_learning_rate=5e-3", "ramp=10", "temperature_steps=200",
        "floor_begin=80", "floor_end=200", "one_object=40", "one_object_end=60",
        "warmup_full=80", "warmup_end=140", "warmup_blur=1.5",
    ), steps=200, seed=2)
    history = run(config, tmp_path / "out")
    accuracy, bound = history["count accuracy"][1], history["held-out -ELBO"][1]
    # A third of the images has any given count.
    assert accuracy[0] < 0.7 and min(accuracy[-2:]) > 0.95
    assert history["loss"][1][-1] < 0.5 * history["loss"][1][0]
    # Independent pixels at their mean rates, the best that a model without objects could do.
    rate = (content["images"][:1900] / 255).mean(0)
    held_out = content["images"][1900:] / 255
    likelihood = np.where(held_out == 1, rate, 1 - rate).clip(1e-4)
    assert bound[-1] < 0.5 * -np.log(likelihood).sum((1, 2, 3)).mean()
    assert bound[-1] < 0.5 * bound[0]


# --- the objective -------------------------------------------------------------------------------


def test_schedules_by_hand() -> None:
    assert [linear(s, 10, 20) for s in (0, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]
    assert [linear(s, 10, 10) for s in (0, 9, 10, 11)] == [0, 0, 1, 1]
    assert linear(0, 0, 0) == 1
    assert [falling(s, 0.04, 0.01, 10, 20) for s in (0, 10, 15, 20, 99)] == pytest.approx(
        [0.04, 0.04, 0.02, 0.01, 0.01])


def objective(steps: int = 100, **schedule) -> tuple[LAVAEObjective, LAVAE]:
    torch.manual_seed(0)
    config = make_config("lavae", "multi-dsprites", settings=[s for s in TINY[:9]])
    model = LAVAE(config.net, (1, 16, 16))
    return LAVAEObjective(LAVAESchedule(**schedule), model, steps), model


def test_learning_rates_by_hand() -> None:
    rates, _ = objective(
        steps=100, learning_rate=0.1, location_learning_rate=0.2, prior_learning_rate=0.3,
        auxiliary_learning_rate=0.4, ramp=9, decay_from=0.5, decay_to=0.1,
    )
    # step: 0 is the first of ten rising steps; the cosine is half-way down after 75.
    for step, factor in ((0, 0.1), (4, 0.5), (9, 1), (50, 1), (75, 0.55), (100, 0.1)):
        found = rates.learning_rates(step)
        assert found == pytest.approx({"location": 0.2 * factor, "prior": 0.3 * factor,
                                       "rest": 0.1 * factor, "auxiliary": 0.4}), step


@pytest.mark.parametrize("name, side, rate", [
    ("multi-dsprites", 21, 5e-4), ("multi-mnist-1k", 17, 1e-4), ("multi-mnist-10k", 17, 1e-4),
])
def test_the_papers_sprites_and_rates(name: str, side: int, rate: float) -> None:
    """Appendix B: the location map's falls by a factor of 100 in 100k steps, no other falls."""
    config = make_config("lavae", name, "paper")
    assert config.net.sprite == side and config.schedule.exact_divergence
    _, model = objective(steps=1)
    learning = LAVAEObjective(config.schedule, model, 500_000)
    for step, factor in ((0, 1.0), (50_000, 0.1), (100_000, 0.01), (499_999, 0.01)):
        found = learning.learning_rates(step)
        assert found["location"] == pytest.approx(rate * factor)
        assert (found["rest"], found["prior"]) == pytest.approx((1e-3, 1e-3))


def test_a_location_map_that_does_not_learn_has_no_rate() -> None:
    rates, _ = objective(location_learning_rate=0.0, location_decay=10)
    assert [rates.learning_rates(step)["location"] for step in (0, 5, 99)] == [0.0, 0.0, 0.0]


def test_rates_reach_the_groups_that_they_name(data) -> None:
    trained = Run(configured(data, "location_learning_rate=0.0", "prior_learning_rate=0.5"), "cpu")
    before = copy.deepcopy(trained.model.state_dict())
    trained.advance()
    after = trained.model.state_dict()
    still = {name.split(".")[0] for name in after if torch.equal(before[name], after[name])}
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert "location_net" in still - moved and moved >= {"sprite_net", "count_prior"}
    # Adam's first step is the learning rate, here at the first of three rising steps.
    by = (after["count_prior.logits"] - before["count_prior.logits"]).abs()
    assert by.tolist() == pytest.approx([0.5 / 3] * 4, rel=1e-3)


def test_the_norm_of_the_gradient_is_clipped_where_it_is_set(data) -> None:
    norms = []
    for setting in ("clip=0", "clip=0.01"):
        trained = Run(configured(data, setting, "precision=float32"), "cpu")
        trained.advance()
        grads = [p.grad.flatten() for p in trained.model.parameters() if p.grad is not None]
        norms.append(float(torch.cat(grads).norm()))
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)


def test_the_decay_of_second_moments_is_the_one_that_is_set(data) -> None:
    for setting, part in (("beta2=0.6", 0.4), ("beta2=0.99", 0.01)):
        trained = Run(configured(data, setting, "precision=float32"), "cpu")
        trained.advance()
        kept = [(p.grad, trained.optimizer.state[p]["exp_avg_sq"])
                for p in trained.model.parameters() if p.grad is not None]
        assert any(grad.any() for grad, _ in kept)
        for grad, squares in kept:  # of Adam's first step
            torch.testing.assert_close(squares, part * grad.square(), rtol=1e-4, atol=0.0)


def images(batch: int = 4) -> Tensor:
    return torch.from_numpy(scenes(batch)["images"]).permute(0, 3, 1, 2) / 255


def test_an_exact_divergence_of_appearances_is_the_mean_of_drawn_ones() -> None:
    """Loss and gradients of the appearances' encoder, over the same draws of all else."""
    found = []
    for exact in (False, True):
        trained, model = objective(
            exact_divergence=exact, warmup_full=0, warmup_end=0, one_object_left=1.0
        )
        weights = [w for name, w in model.named_parameters() if name.startswith("appearance_net")]
        rows = []
        for seed in range(300):
            torch.manual_seed(seed)
            model.zero_grad()
            loss = torch.tensor([trained.backward(model, images(8), 50)["loss"]])
            rows.append(torch.cat([loss, *(w.grad.flatten() for w in weights)]))
        found.append(torch.stack(rows).double())
    difference = found[1] - found[0]
    error = difference.std(0) / math.sqrt(len(difference))
    assert error[0] > 0 and (error > 0).double().mean() > 0.5
    assert (difference.mean(0).abs() < 5 * error + 1e-5).all()
    assert found[1].std(0).norm() < found[0].std(0).norm()


@pytest.mark.parametrize("step, left, part", [
    (0, 0.0, 1.0), (4, 0.0, 1.0), (7, 0.0, 0.5), (10, 0.0, 0.0), (99, 0.3, 0.3)])
def test_one_object_is_forced_at_first(step, left, part) -> None:
    trained, model = objective(one_object=4, one_object_end=10, one_object_left=left,
                               warmup_full=0, warmup_end=0)
    heights = torch.zeros(400, 16, 16)
    heights[:, 3, 3] = heights[:, 12, 12] = 100.0
    model.location_net.forward = lambda x: heights
    seen = []
    guide = model.guide
    model.guide = lambda x, encoded: seen.extend(encoded.count.tolist()) or guide(x, encoded)
    figures = trained.backward(model, images(400), step)
    assert len(seen) == 400
    assert np.equal(seen, 1).mean() == pytest.approx(part, abs=0.1 if 0 < part < 1 else 0)
    assert figures["objects"] == 2.0  # what the model saw, whatever was forced


def test_a_step_leaves_the_model_as_it_is_evaluated() -> None:
    trained, model = objective(temperature=2.0, floor=0.2, floor_begin=5)
    before, seen = dict(vars(model)), []
    encode = model._logits
    model._logits = lambda encoded: seen.append(
        (model.temperature, model.likelihood.floor)) or encode(encoded)
    trained.backward(model, images(), 0)
    assert seen == [(2.0, 0.2)]
    setattr(model, "_logits", lambda encoded: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained.backward(model, images(), 0)
    del model._logits
    assert model.temperature is None and model.likelihood.floor == model.config.likelihood_floor
    plain = {name for name, value in before.items() if isinstance(value, float | bool | None)}
    assert {name: vars(model)[name] for name in plain} == {name: before[name] for name in plain}


@pytest.mark.parametrize("step, temperature, floor", [
    (0, 2.0, 0.2), (5, 1.0, math.sqrt(0.2 * 0.002)), (10, 0.5, 0.002), (99, 0.5, 0.002),
])
def test_temperature_and_floor_fall_by_hand(step, temperature, floor) -> None:
    """Geometrically, each over its own steps; the floor to the model's own."""
    trained, model = objective(
        temperature=2.0, temperature_end=0.5, temperature_steps=10, floor=0.2, floor_begin=2,
        floor_end=8, warmup_full=0, warmup_end=0,
    )
    model.config = replace(model.config, likelihood_floor=0.002)
    seen, guide = [], model.guide
    model.guide = lambda x, encoded: seen.append(
        (model.temperature, model.likelihood.floor)) or guide(x, encoded)
    trained.backward(model, images(), step)
    (found,) = seen
    assert found == pytest.approx((temperature, floor))


def test_a_normal_likelihood_has_no_floor_and_is_the_auxiliary_vaes_too() -> None:
    _, model = objective()
    model = LAVAE(replace(model.config, likelihood="normal", sigma=0.4), (1, 16, 16))
    trained = LAVAEObjective(LAVAESchedule(warmup_full=5, warmup_end=10), model, 100)
    for each in (model, trained.auxiliary):
        assert each.likelihood.name == "normal, sigma 0.4"
    seen, guide = [], model.guide
    model.guide = lambda x, encoded: seen.append(
        {**vars(model.likelihood)}) or guide(x, encoded)
    before = {**vars(model.likelihood)}
    for step in (0, 50):
        figures = trained.backward(model, torch.rand(4, 1, 16, 16), step)
        assert math.isfinite(figures["loss"])
    assert seen == [before] * 2


@pytest.mark.parametrize("rest_from", [1.0, 0.4])
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_ever_fewer_images_are_probed_until_places_rest(part, rest_from) -> None:
    """With an object more than was counted, which is not in the figure of what the model saw."""
    trained, model = objective(
        steps=100, probe=0.8, rest_from=rest_from, one_object=0, one_object_end=0, warmup_full=0,
        warmup_end=0,
    )
    heights = torch.zeros(400, 16, 16)
    heights[:, 3, 3] = heights[:, 12, 12] = 100.0
    model.location_net.forward = lambda x: heights
    seen, guide = [], model.guide
    model.guide = lambda x, encoded: seen.append(encoded) or guide(x, encoded)
    figures = trained.backward(model, images(400), round(100 * rest_from * part))
    (encoded,) = seen
    share = encoded.probed.float().mean().item()
    assert share == pytest.approx(0.8 * (1 - part), abs=0.1 if part < 1 else 0)
    assert torch.equal(encoded.count.long(), 2 + encoded.probed.long())
    assert figures["objects"] == pytest.approx(2.0)


def test_the_location_map_learns_at_some_steps_only_once_it_has_settled() -> None:
    trained, model = objective(
        location_every=3, location_settled=4, one_object=99, warmup_full=0, warmup_end=0)
    learning = []
    for step in range(10):
        model.zero_grad(set_to_none=True)
        trained.backward(model, images(), step)
        grads = [p.grad for p in model.location_net.parameters() if p.grad is not None]
        assert not grads or any(grad.any() for grad in grads)
        if grads:
            learning.append(step)
        assert all(p.grad.any() for p in model.sprite_net.parameters())
    assert learning == [0, 1, 2, 3, 6, 9]


def test_the_warm_up_pulls_the_map_to_its_target() -> None:
    trained, model = objective(warmup_full=5, warmup_end=10, warmup_weight=3.0, one_object=99)
    x, target = images(), torch.full((4, 16, 16), 2.0)
    trained.location_target = lambda kl, size: target
    squares = (model.encode(x).heights - target).square().sum().item() / 4
    for step, weight in ((0, 3.0), (5, 3.0), (8, 1.2), (10, 0.0)):
        model.zero_grad()
        figures = trained.backward(model, x, step)
        assert figures["warmup"] == pytest.approx(weight * squares, rel=1e-4)
    # With all its weight on the target, a step down the gradient goes towards it.
    trained.schedule = LAVAESchedule(warmup_weight=1e4, one_object=99)
    optimizer = torch.optim.SGD(model.location_net.parameters(), 1e-9)
    optimizer.zero_grad()
    trained.backward(model, x, 0)
    optimizer.step()
    assert (model.encode(x).heights - target).square().sum().item() / 4 < squares


def test_the_target_has_a_peak_for_each_object() -> None:
    trained, model = objective(warmup_height=3.0, warmup_blur=2.0)
    kl = 0.1 * torch.rand(2, 8, 8) + 1.0  # background cells cost something everywhere
    kl[0, 1, 1] = kl[0, 2, 1] = 9.0  # one object in two cells
    kl[0, 6, 6] = 8.0  # the other is in one
    target = trained.location_target(kl, (32, 32))
    assert target.shape == (2, 32, 32)
    # No peak where there is nothing; at the cells of the first, 4 x 4 pixels each, otherwise.
    assert find_peaks(target, 1.5, 9).sum((1, 2)).tolist() == [2, 0]
    assert target[0].max().item() == pytest.approx(3.0, rel=1e-3)
    for row, column in ((7, 5), (25, 25)):
        near = target[0, row - 2:row + 3, column - 2:column + 3]
        assert near.max().item() == pytest.approx(3.0, rel=1e-3)


def test_a_target_that_is_not_blurred_is_highest_where_the_divergence_is() -> None:
    trained, _ = objective(warmup_height=3.0, warmup_blur=0.0)
    kl = torch.full((1, 8, 8), 1.0)
    kl[0, 2, 5] = 9.0
    target = trained.location_target(kl, (32, 32))[0]
    peaks = (target == target.max()).nonzero().float()
    assert target.max().item() == pytest.approx(3.0, rel=1e-5)
    assert peaks.mean(0).tolist() == [4 * 2 + 1.5, 4 * 5 + 1.5]


def test_a_map_of_a_single_cell_has_no_peak() -> None:
    trained, _ = objective(warmup_height=3.0, warmup_blur=2.0)
    target = trained.location_target(torch.full((2, 1, 1), 5.0), (4, 4))
    assert torch.equal(target, torch.zeros(2, 4, 4))


def test_the_papers_target_is_the_map_itself() -> None:
    trained, _ = objective(warmup_height=0.0)
    kl = torch.rand(2, 4, 4)
    target = trained.location_target(kl, (16, 16))
    assert torch.equal(target, kl.repeat_interleave(4, 1).repeat_interleave(4, 2))


def test_the_papers_warm_up_has_the_papers_auxiliary_vae() -> None:
    for preset, shape in (("fast", (4, 16, 16)), ("paper", (8, 11, 11))):
        config = make_config("lavae", "multi-dsprites", preset)
        trained = LAVAEObjective(config.schedule, LAVAE(config.net, (3, 64, 64)), 100)
        x = torch.zeros(1, 3, 64, 64)
        assert trained.auxiliary.encode(x).shape == (1, 2 * shape[0], *shape[1:])
        target = trained.location_target(trained.auxiliary.kl_map(x), (64, 64))
        assert target.shape == (1, 64, 64)


def test_the_kl_map_is_the_divergence_of_each_cell() -> None:
    torch.manual_seed(0)
    vae, x = ConvVAE(ConvVAEConfig(3, 2, 8), (1, 16, 16)), images()
    mean, log_variance = vae.encoder(x).chunk(2, 1)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
        torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(vae.kl_map(x), exact.sum(1), atol=1e-5)
    assert vae.kl_map(x).shape == (4, 4, 4)
