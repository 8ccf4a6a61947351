"""The hand-written ELBO is Pyro's to float64 precision; turns, ratios and the told places."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pyro
import pytest
import torch
from click.testing import CliRunner
from pyro import poutine
from torch import Tensor

from pyro_scenes import bench, checkpoint, cli
from pyro_scenes.bench import floors, growth, launches, plain, pyro_air, scaling, turns
from pyro_scenes.bench.late import Told, Trainer
from pyro_scenes.bench.turns import take_turns
from pyro_scenes.config import make_config
from pyro_scenes.data import SceneData, make
from pyro_scenes.errors import UserError
from pyro_scenes.models.lavae import LAVAE, Encoded, LAVAEConfig
from pyro_scenes.objectives.base import temporarily
from pyro_scenes.objectives.lavae import LAVAEObjective
from pyro_scenes.priors import LearnedCount

TINY = LAVAEConfig(
    max_objects=3, latent=2, sprite=5, crop=7, location_width=8, location_blocks=1,
    appearance_width=4, appearance_hidden=6, sprite_hidden=(5,), count_window=3, blocked_window=3,
    logit_scale=0.5, count_threshold=2.0,
)
SHAPE = (3, 12, 8)
# Far enough apart to be counted each, and near enough for sprites to overlap and to be cut.
PLACES = [(1, 1), (5, 2), (6, 6), (10, 4)]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything in float64; the networks' ``float()``, their way out of bfloat16, as well."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def told(counts: list[int], max_objects: int = 3) -> tuple[LAVAE, Tensor]:
    """A tiny model in float64 that sees so many objects in each of a batch of images."""
    torch.manual_seed(0)
    model = LAVAE(replace(TINY, max_objects=max_objects), SHAPE)
    peaks = torch.zeros(len(counts), *SHAPE[1:])
    for image, count in enumerate(counts):
        for place in PLACES[:count]:
            # Other places stay likely enough for their gradient to count in the sums compared.
            peaks[(image, *place)] = 2.5
    model.location_net = Told(model.location_net, peaks)
    assert isinstance(model.count_prior, LearnedCount)
    torch.nn.init.normal_(model.count_prior.logits)
    model.double().train()
    model.temperature = 0.7
    return model, (torch.rand(len(counts), *SHAPE) < 0.3).double()


def next_noise(model: LAVAE, encoded: Encoded) -> plain.Noise:
    """The numbers that Pyro's guide draws next, in its order."""
    logits = encoded.heights.detach().flatten(1)
    slots = int(encoded.count.max().clamp(max=model.config.max_objects))
    mean = logits.new_zeros(len(logits), model.config.latent)
    places = [torch.rand_like(logits) for _ in range(slots)]
    normals = [torch.normal(mean, torch.ones_like(mean)) for _ in range(slots)]
    return plain.Noise(
        torch.stack(places) if places else logits.new_zeros(0, *logits.shape),
        torch.stack(normals) if normals else mean.new_zeros(0, *mean.shape),
    )


BATCHES = pytest.mark.parametrize("counts, max_objects", [
    ([2, 0, 3, 1, 3, 0], 3),
    ([0, 0], 3),
    ([4, 1, 0, 2], 2),  # more than the model's limit
])


@BATCHES
def test_the_elbo_of_each_image_is_pyros(
    double: None, counts: list[int], max_objects: int
) -> None:
    model, x = told(counts, max_objects)
    encoded = model.encode(x)
    assert encoded.count.tolist() == counts
    state = torch.get_rng_state()
    guide = poutine.trace(model.guide).get_trace(x)
    joint = poutine.trace(poutine.replay(model.model, trace=guide)).get_trace(x)
    guide.compute_log_prob()
    joint.compute_log_prob()
    log_p, log_q = (
        sum(
            site["log_prob"] for name, site in trace.nodes.items()
            if site["type"] == "sample" and name != "images"
        )
        for trace in (joint, guide)
    )
    torch.set_rng_state(state)
    noise = next_noise(model, encoded)
    objects, plain_log_q = plain.draw(model, x, encoded, noise)
    # The same z, the objects of an image in the order of their sites.
    sites = [
        (b, i) for b, count in enumerate(counts) for i in range(min(count, max_objects))
    ]
    assert objects.image.tolist() == [b for b, _ in sites]
    for p, (b, i) in enumerate(sites):
        assert torch.equal(objects.places[p], guide.nodes[f"z_loc_{i}"]["value"][b])
        torch.testing.assert_close(
            objects.appearances[p], guide.nodes[f"z_app_{i}"]["value"][b], rtol=1e-12, atol=1e-12
        )
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 0.0}
    torch.testing.assert_close(plain_log_q, log_q, **close)
    torch.testing.assert_close(plain.log_joint(model, x, objects), log_p, **close)
    torch.testing.assert_close(plain.elbo(model, x, encoded, noise), log_p - log_q, **close)


@BATCHES
def test_the_gradients_of_a_step_are_the_objectives(
    double: None, counts: list[int], max_objects: int
) -> None:
    """By what the benchmark's own step estimates, at another temperature and reach."""
    model, x = told(counts, max_objects)
    step = 100
    timed = Trainer("fast", make("multi-dsprites", 2, segmentation=False), torch.device("cpu"))
    objective = LAVAEObjective(
        replace(
            timed.objective.schedule,
            one_object=0, one_object_end=0, warmup_full=0, warmup_end=0,
            temperature=0.7, temperature_end=0.7, floor_begin=0, floor_end=0,
            location_every=1, reach=2,
        ),
        model, step,
    )  # fmt: skip
    state = torch.get_rng_state()
    with pyro.validation_enabled(False):
        figures = objective.backward(model, x, step)
    pyros = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(state)
    torch.rand(len(x)), torch.rand(len(x))  # which images are probed, and forced to one object
    schedule = objective.schedule
    with temporarily(model, slope=schedule.slope / len(x), reach=schedule.reach):
        encoded = model.encode(x)
        loss = -plain.elbo(model, x, encoded, next_noise(model, encoded)).mean()
        loss.backward()
    assert loss.item() == pytest.approx(figures["loss"], rel=1e-10)
    reached = {name for name, gradient in pyros.items() if gradient is not None and gradient.any()}
    assert reached == (set(pyros) if any(counts) else {"count_prior.logits"})
    for name, parameter in model.named_parameters():
        # None and 0 are the same step.
        ours, theirs = (
            torch.zeros_like(parameter) if gradient is None else gradient
            for gradient in (parameter.grad, pyros[name])
        )
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm(), name


def test_fresh_noise_draws_what_the_guide_needs() -> None:
    model, _ = told([1, 4, 0], max_objects=3)
    heights = torch.zeros(3, *SHAPE[1:])
    noise = plain.fresh_noise(model, Encoded(heights, torch.tensor([1, 4, 0])))
    assert noise.places.shape == (3, 3, 96) and noise.appearances.shape == (3, 3, 2)
    assert 0 <= noise.places.min() < 0.05 and 0.95 < noise.places.max() < 1
    assert noise.appearances.min() < 0 < noise.appearances.max()


@pytest.fixture(scope="module")
def scenes() -> SceneData:
    return make("multi-dsprites", 12, segmentation=False)


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_an_untrained_model_finds_the_places_that_it_is_told(
    preset: str, scenes: SceneData
) -> None:
    trainer = Trainer(preset, scenes[:6], torch.device("cpu"))
    found = trainer.model.infer(trainer.x[:4])  # the first images of the batch
    assert found.counts.tolist() == scenes.counts[:4].tolist()
    for image in range(4):
        there = torch.from_numpy(scenes.boxes[image, :, :2])
        for place in found.where[image, found.present[image]]:
            assert ((there - place).abs().amax(-1) <= 0.5).any()


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_step_moves_every_parameter_in_the_precision_asked_for(
    by_hand: bool, bfloat16: bool, scenes: SceneData
) -> None:
    trainer = Trainer("fast", scenes[3:5], torch.device("cpu"), bfloat16, by_hand)
    seen = []
    for net in (trainer.model.location_net.net.trunk, trainer.model.appearance_net.convolutions):
        net.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pyro.validation_enabled(False):
        trainer.step()
    assert seen == [torch.bfloat16 if bfloat16 else torch.float32] * 2
    assert [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])] == []


def test_contestants_take_turns_and_the_first_round_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])
    called = []

    def call(name: str) -> None:
        called.append(name)
        clock[0] += len(called) + (100 if len(called) <= 2 else 0)

    seconds = take_turns(
        {name: (partial(call, name), amount) for name, amount in (("a", 1), ("b", 10))},
        2, torch.device("cpu"),
    )
    assert "".join(called) == "abbaab"
    assert seconds == {"a": [4.0, 5.0], "b": [0.3, 0.6]}


def spread(middle: float) -> dict[str, float]:
    return {"median": middle, "min": middle / 2, "max": 2 * middle}


ARITHMETIC = {
    "rate": {"torch.float32": spread(5e10)},
    "steps": {"lavae-x": {"operations": {"torch.float32": 3_000_000_000}, "batch": 64,
                          "seconds": spread(0.25), "floor": spread(0.24)}},
}
GROWTH = [
    {"of": "canvas", "side": 64, "objects": 3, "batch": 8, "seconds_per_image": spread(0.002)},
    {"of": "particles", "side": 64, "objects": 7, "particles": 9, "seconds_per_image": spread(1.5)},
]


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the benchmark with measurements of their own, made up."""
    monkeypatch.setattr(floors, "compare", lambda rounds, device: ARITHMETIC)
    monkeypatch.setattr(growth, "costs", lambda axes, rounds, device: GROWTH)


def test_ratios_are_taken_within_a_round(
    monkeypatch: pytest.MonkeyPatch, arithmetic: None
) -> None:
    turns = {
        "ours, bfloat16": [2.0, 4.0, 9.0], "plain torch, bfloat16": [1.0, 4.0, 3.0],
        "ours, float32": [6.0, 4.0, 9.0], "plain torch, float32": [6.0, 2.0, 6.0],
        "paper's networks": [30.0, 40.0, 20.0], "fast preset's": [1.0, 1.0, 2.0],
        "images generated": [0.5, 0.25, 0.1], "particles x images evaluated": [1.0, 2.0, 4.0],
    }
    monkeypatch.setattr(
        bench, "take_turns", lambda work, rounds, device: {name: turns[name] for name in work}
    )
    result = bench.run("cpu", quick=True)
    assert result["ratios"] == {
        "ours / plain torch, bfloat16": {"median": 2.0, "min": 1.0, "max": 3.0},
        "ours / plain torch, float32": {"median": 1.5, "min": 1.0, "max": 2.0},
        "float32 / bfloat16": {"median": 1.0, "min": 1.0, "max": 3.0},
        "paper's networks / fast preset's": {"median": 30.0, "min": 10.0, "max": 40.0},
    }
    assert result["per_second"]["images generated"] == {"median": 4.0, "min": 2.0, "max": 10.0}
    assert result["seconds_per_image"]["ours, bfloat16"]["median"] == 4.0
    assert 0 < result["peak_memory_mib"]["after everything"] < 1e6
    assert json.loads(json.dumps(result)) == result
    printed = bench.table(result).splitlines()
    assert result["machine"]["processor"] in printed[0]
    line = next(line for line in printed if line.startswith("  ours / plain torch, bfloat16"))
    assert line.split()[5:] == ["2.00", "(1.00", "to", "3.00)", "goal:", "at", "most", "1.15"]
    assert "  ours, bfloat16" in [line[:16] for line in printed if "4000.00" in line]
    line = next(line for line in printed if line.startswith("  lavae-x"))
    assert line.split()[1:6] == ["24%", "(12%", "to", "48%)", "of"] and "3.0 billion" in line
    assert any("float32" in line and line.endswith(" 50") for line in printed)
    costs = {line[:43].strip(): float(line[43:]) for line in printed if " objects, " in line}
    assert costs == {
        "64 x 64, 3 objects, step, batch 8": 2.0, "64 x 64, 7 objects, bound, particles 9": 1500.0
    }


def test_the_benchmark_leaves_torchs_random_numbers_alone(
    monkeypatch: pytest.MonkeyPatch, arithmetic: None
) -> None:
    monkeypatch.setattr(bench, "take_turns", lambda work, rounds, device: {n: [1.0] for n in work})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bench.run("cpu", quick=True)
    assert torch.equal(torch.rand(3), expected)


# --- the arithmetic of a step, and how its cost grows -----------------------------------------


def test_operations_by_hand() -> None:
    layer, x = torch.nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    with floors.Operations() as operations:
        layer(x).square().sum().backward()
    # A product for the values, one for the gradient of the weights and one for that of x.
    assert operations.counted == {torch.float32: 3 * 2 * 3 * 5 * 7}
    net, image = torch.nn.Conv2d(2, 4, 3, padding=1), torch.randn(1, 2, 6, 8)
    with floors.Operations() as operations:
        with torch.autocast("cpu", torch.bfloat16):
            y = net(image)
        y.float().sum().backward()
    # Nothing wants the gradient of the image.
    assert operations.counted == {torch.bfloat16: 2 * 2 * (6 * 8) * (3 * 3) * (2 * 4)}


def test_a_floor_is_the_operations_at_the_rate_of_their_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Step:
        def __init__(self, name: str, device: torch.device):
            self.run = Namespace(config=Namespace(train=Namespace(batch_size=4)))

        def __call__(self) -> None: ...

        def operations(self) -> dict[torch.dtype, int]:
            return {torch.float32: 100, torch.bfloat16: 1000}

    turns = {
        "air-multi-sprites": [500.0, 800.0],
        "torch.float32": [1.0, 2.0], "torch.bfloat16": [0.1, 0.2],
    }
    monkeypatch.setattr(floors, "TRAININGS", ("air-multi-sprites", "not-there"))
    monkeypatch.setattr(floors, "MiddleStep", Step)
    monkeypatch.setattr(
        floors, "take_turns", lambda work, rounds, device: {name: turns[name] for name in work}
    )
    measured = floors.compare(2, torch.device("cpu"))
    (step,) = measured["steps"].values()
    assert step["floor"] == {"median": 0.45, "min": 0.4, "max": 0.5}
    assert step["operations"] == {"torch.float32": 100, "torch.bfloat16": 1000}
    assert measured["rate"]["torch.bfloat16"] == {"median": 7.5, "min": 5.0, "max": 10.0}
    assert json.loads(json.dumps(measured)) == measured


def test_the_middle_step_of_a_shipped_training_is_taken_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(floors, "IMAGES", 80)
    step = floors.MiddleStep("air-multi-sprites", torch.device("cpu"))
    shipped = checkpoint.load("air-multi-sprites")
    before = [p.detach().clone() for p in step.run.model.parameters()]
    assert all(map(torch.equal, before, shipped.model.parameters()))
    for _ in range(2):
        step()
        assert step.run.step == shipped.config.train.steps // 2 + 1
    assert not any(map(torch.equal, before, step.run.model.parameters()))
    assert step.operations()[torch.float32] > 1e8


def test_scenes_of_any_size_show_the_objects_that_they_say() -> None:
    for side, objects in ((64, 3), (64, 16), (80, 36)):
        data = growth.scenes(side, objects, 2)
        trainer = Trainer("fast", data, torch.device("cpu"), settings=[f"max_objects={objects}"])
        with torch.no_grad():
            assert trainer.model.encode(trainer.x).count.tolist() == [objects] * 2
    assert (growth.room(64), growth.room(80)) == (16, 36)


def test_costs_are_of_the_sizes_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def once(work, rounds: int, device: torch.device) -> dict[str, list[float]]:
        for call, _ in work.values():
            call()
        calls.append(rounds)
        return {name: [float(amount)] for name, (_, amount) in work.items()}

    monkeypatch.setattr(growth, "take_turns", once)
    axes = growth.Axes(
        sides=(28, 40), objects=(2, 7), batches=(1,), particles=(3,), batch=2, images=1
    )
    rows = growth.costs(axes, 5, torch.device("cpu"))
    assert calls == [5]
    assert [(row["of"], row["side"], row["objects"]) for row in rows] == [
        ("canvas", 28, 2), ("canvas", 40, 2), ("canvas", 40, 7), ("batch", 28, 2),
        ("particles", 28, 2),
    ]
    assert [row["seconds_per_image"]["median"] for row in rows] == [2.0, 2.0, 2.0, 1.0, 1.0]
    assert rows[3]["batch"] == 1 and rows[4]["particles"] == 3


# --- Pyro's own AIR: a stand-in that the tests write ------------------------------------------

AIR_PY = """
import warnings

import pyro
import pyro.distributions as dist
from modules import Net


class AIR(Net):
    def model(self, data, batch_size, z_pres_prior_p):
        warnings.warn("as the real one does")
        with pyro.plate("data", len(data)):
            here = pyro.sample("z_pres_0", dist.Bernoulli(z_pres_prior_p(0)))
            noise = dist.Normal(here, self.settings["likelihood_sd"])
            pyro.sample("obs", noise, obs=data.mean((1, 2)))

    def guide(self, data, batch_size, z_pres_prior_p):
        pyro.module("net", self.net)
        assert len(data) == batch_size
        with pyro.plate("data", len(data)):
            logits = self.net(data.flatten(1)).squeeze(-1)
            pyro.sample("z_pres_0", dist.Bernoulli(logits=logits))
"""
MODULES_PY = """
from torch import nn


class Net(nn.Module):
    def __init__(self, x_size, **settings):
        super().__init__()
        self.settings = settings
        self.net = nn.Linear(x_size**2, 1)
"""


@pytest.fixture
def air_folder(tmp_path: Path) -> Path:
    (tmp_path / "air.py").write_text(AIR_PY)
    (tmp_path / "modules.py").write_text(MODULES_PY)
    return tmp_path


def test_the_folder_with_pyros_air_leaves_no_trace(
    air_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modules", json)  # another's of that name
    path, files = list(sys.path), sorted(air_folder.rglob("*"))
    assert pyro_air.load(air_folder).__name__ == "AIR"
    assert sys.path == path and sorted(air_folder.rglob("*")) == files
    assert sys.modules["modules"] is json and "air" not in sys.modules


def test_both_airs_train_in_turn_and_the_store_of_parameters_stays_ours(air_folder: Path) -> None:
    theirs = pyro_air.load(air_folder)
    pyro.get_param_store().clear()
    with torch.random.fork_rng():
        work = pyro_air.contestants(theirs, 4, torch.device("cpu"))
    trainers = {name: getattr(call, "__self__") for name, (call, _) in work.items()}
    parameters = {
        name: dict((trainer.air if name == pyro_air.THEIRS else trainer.model).named_parameters())
        for name, trainer in trainers.items()
    }
    shared = trainers[pyro_air.THEIRS].air.settings
    for preset, name in pyro_air.OURS.items():
        model = trainers[name].model
        assert model.config.networks == preset and model.image_shape == (1, 50, 50)
        assert model.steps == shared["num_steps"] == 3
        assert model.config.window == shared["window_size"]
        assert model.config.latent == shared["z_what_size"]
        assert model.likelihood.sigma == shared["likelihood_sd"]
    before = {n: {k: p.detach().clone() for k, p in of.items()} for n, of in parameters.items()}
    with torch.random.fork_rng(), pyro.validation_enabled(False), pyro_air.apart():
        seconds = take_turns(work, 1, torch.device("cpu"))
        assert set(pyro.get_param_store()) == {"net$$$weight", "net$$$bias"}
    assert list(seconds) == ["Pyro's AIR", "our AIR, fast", "our AIR, paper"]
    for name, of in parameters.items():
        assert [k for k, p in of.items() if torch.equal(p, before[name][k])] == [], name
    assert not set(pyro.get_param_store())
    assert not pyro.settings.get("module_local_params")  # which is Pyro's default


def test_the_prior_of_pyros_air_is_geometric_up_to_the_limit() -> None:
    more = torch.tensor(pyro_air.continuing(0.1, 3))
    reached = torch.cat([torch.ones(1), more.cumprod(0), torch.zeros(1)])
    torch.testing.assert_close(
        reached[:-1] - reached[1:], torch.tensor([1.0, 0.1, 0.01, 0.001]) / 1.111
    )


def test_the_ratios_with_pyros_air_are_printed_and_written(
    air_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arithmetic: None
) -> None:
    turns = {"Pyro's AIR": [8.0, 6.0], "our AIR, fast": [2.0, 1.0], "our AIR, paper": [4.0, 6.0]}
    monkeypatch.setattr(
        bench, "take_turns", lambda work, *_: {name: turns.get(name, [1.0]) for name in work}
    )
    out = tmp_path / "new.json"
    line = ["--quick", "--device", "cpu", "--json", str(out), "--pyro-air", str(air_folder)]
    result = CliRunner().invoke(cli.bench, line)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert {name: row for name, row in written["ratios"].items() if "Pyro" in name} == {
        "Pyro's AIR / ours, fast": {"median": 5.0, "min": 4.0, "max": 6.0},
        "Pyro's AIR / ours, paper": {"median": 1.5, "min": 1.0, "max": 2.0},
    }
    assert written["size"]["air"] == {"side": 50, "steps": 3}
    printed = result.stdout.splitlines()
    row = next(line for line in printed if line.startswith("  Pyro's AIR / ours, fast"))
    assert row.split()[5:] == ["5.00", "(4.00", "to", "6.00)", "goal:", "at", "least", "4"]
    assert any(line.startswith("AIR: images of 50 x 50 pixels, T = 3") for line in printed)
    # The same without: AIR is left out.
    result = CliRunner().invoke(cli.bench, line[:3])
    assert result.exit_code == 0 and "AIR" not in result.stdout


@pytest.mark.parametrize("air, modules, told", [
    (None, None, "has no air.py"),
    (AIR_PY, None, "has no modules.py"),
    ("import nothing_of_that_name", "", "nothing_of_that_name"),
    ("AIR = ", "", "SyntaxError"),
    ("", "", "'AIR'"),
    ("class AIR:\n    def __init__(self, size):\n        pass", "", "unexpected keyword"),
    ("class AIR(dict):\n    pass", "", "'model'"),
])
def test_a_folder_without_pyros_air_is_told_in_one_line(
    air: str | None, modules: str | None, told: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, content in (("air.py", air), ("modules.py", modules)):
        if content is not None:
            (tmp_path / name).write_text(content)
    monkeypatch.setattr(bench, "take_turns", lambda *_: pytest.fail("measured before"))
    result = CliRunner().invoke(
        cli.bench, ["--quick", "--device", "cpu", "--pyro-air", str(tmp_path)]
    )
    assert result.exit_code == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and told in line


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.bench, ["--quick", "--pyro-air", str(tmp_path / "nope")])
    assert result.exit_code == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {tmp_path}/nope has no air.py")


# --- several processes ---------------------------------------------------------------------------


def measured(processes: int, threads: int, step: float, image: float) -> dict:
    return {"processes": processes, "threads": threads, "step": {"median": step},
            "exchange": {"median": 0.002}, "image": image, "gradient": 4_000_000}


SEVERAL = {"machine": {"processor": "P", "cores": 2, "device": "cpu", "torch": "2"},
           "batch": 64, "steps": 3, "rows": [measured(1, 1, 0.3, 0.02), measured(2, 1, 0.2, 0.01)],
           "launches": {"air-x": {"batch": 64, "operations": 3000, "waits": 5}}}


def test_rows_of_several_processes_are_compared_with_the_first() -> None:
    lines = scaling.table(SEVERAL).splitlines()
    assert "P, 2 cores, cpu, torch 2" in lines[0] and "4.0 MB" in lines[0]
    assert lines[4:6] == ["| 1 | 1 | 300 | 1.00 | - | 20 | 1.00 |",
                          "| 2 | 1 | 200 | 1.50 | 2.0 | 10 | 2.00 |"]


def test_what_more_machines_would_gain_by_hand() -> None:
    """200 ms a step at best; a ring of N sends 2 (N - 1) / N of 4 MB: 4 ms and 7 ms at 1 GB/s."""
    lines = scaling.table(SEVERAL).splitlines()
    assert "| 10 Gbit Ethernet, 1 GB/s | 4 | 7 | 1.9 | 6.2 |" in lines
    assert "| NVLink, 200 GB/s | 0.02 | 0.035 | 2.0 | 8.0 |" in lines


def test_operations_at_the_time_of_a_launch_by_hand() -> None:
    assert scaling.table(SEVERAL).splitlines()[-1] == "| air-x | 64 | 3,000 | 5 | 30 | 90 |"


def test_launches_by_hand() -> None:
    x, some = torch.rand(4, requires_grad=True), torch.tensor([True, False, True, True])
    with launches.Launches() as counted:
        y = x.view(2, 2).exp()  # a view is none
        y.sum().backward()  # the sum, a one, and its product with the slope
    assert (counted.operations, counted.waits) == (4, 0)
    with launches.Launches() as counted, torch.no_grad():
        float(x.sum())  # the sum, and its value
        x[some]
        x[torch.tensor([0])]
        x.nonzero()
    assert counted.waits == 3


def test_the_launches_of_a_shipped_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "TRAININGS", ("air-multi-sprites",))
    monkeypatch.setattr(floors, "IMAGES", 80)
    found, again = (launches.count()["air-multi-sprites"] for _ in range(2))
    assert found == again and found["batch"] == 64
    assert 500 < found["operations"] < 10_000 and 0 < found["waits"] < 100


def test_one_process_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "count", dict)
    (row,) = scaling.run("cpu", steps=1, most=1)["rows"]
    assert (row["processes"], row["threads"]) == (1, 1)
    assert row["step"]["median"] > 0 and row["image"] > 0
    usual = make_config(scaling.MODEL, scaling.DATA)
    parameters = checkpoint.build(usual, (3, 64, 64)).parameters()
    assert row["gradient"] == 4 * sum(p.numel() for p in parameters)
    with pytest.raises(UserError, match="1 processes of 0 threads failed: "):
        scaling._row(1, 0, "cpu", 1)


# --- the command ---------------------------------------------------------------------------------


def page(command: str, text: str) -> str:
    return f"before\n<!-- {command} --readme -->\n{text}\n<!-- end of {command} -->\nafter\n"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """What the command asks to be measured; nothing is."""
    asked: list = []
    monkeypatch.setattr(scaling, "run", lambda *given: asked.append(given) or SEVERAL)
    monkeypatch.setattr(bench, "run", lambda *given: asked.append(given) or {"measured": 1.5})
    monkeypatch.setattr(bench, "table", lambda result: f"a table\nof {result}")
    return asked


@pytest.mark.parametrize("options, steps", [([], 40), (["--quick"], 5)])
def test_several_processes_are_printed_written_and_put_into_a_page(
    options: list[str], steps: int, asked: list, tmp_path: Path
) -> None:
    out, readme = tmp_path / "new.json", tmp_path / "page.md"
    readme.write_text(page("svi-bench", "kept") + page("svi-bench --scaling", "old\nlines"))
    line = ["--scaling", "--device", "cpu", "--json", str(out), "--readme", str(readme), *options]
    result = CliRunner().invoke(cli.bench, line)
    assert result.exit_code == 0, result.output
    table = scaling.table(SEVERAL)
    assert asked == [("cpu", steps)] and result.stdout == f"{table}\n"
    assert json.loads(out.read_text()) == SEVERAL
    assert readme.read_text() == page("svi-bench", "kept") + page("svi-bench --scaling", table)


def test_the_benchmarks_table_is_put_into_a_page(asked: list, tmp_path: Path) -> None:
    readme = tmp_path / "page.md"
    readme.write_text(page("svi-bench --scaling", "kept") + page("svi-bench", "old"))
    result = CliRunner().invoke(cli.bench, ["--device", "cpu", "--readme", str(readme)])
    assert result.exit_code == 0, result.output
    assert asked == [("cpu", False, None)]
    table = "```\na table\nof {'measured': 1.5}\n```"
    assert readme.read_text() == page("svi-bench --scaling", "kept") + page("svi-bench", table)


@pytest.mark.parametrize("line, told", [
    ("--scaling --figure new.png", "--figure and --pyro-air do not go with --scaling"),
    ("--scaling --pyro-air .", "--figure and --pyro-air do not go with --scaling"),
    ("--scaling --json kept.json", "kept.json exists"),
    ("--scaling --readme plain.md", "plain.md has no lines <!-- svi-bench --scaling --readme -->"),
    ("--readme scaling.md", "scaling.md has no lines <!-- svi-bench --readme -->"),
])
def test_what_the_benchmark_cannot_write_is_told_before_it_measures(
    line: str, told: str, asked: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.json").write_text("precious")
    (tmp_path / "plain.md").write_text(page("svi-bench", "kept"))
    (tmp_path / "scaling.md").write_text(page("svi-bench --scaling", "kept"))
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    result = CliRunner().invoke(cli.bench, line.split())
    assert result.exit_code == 2 and told in result.stderr.splitlines()[-1]
    assert not asked and not result.stdout
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before
