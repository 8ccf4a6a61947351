"""Calibration against truth: exact posteriors have uniform ranks, and what is off is caught."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner
from matplotlib.patches import Rectangle
from PIL import Image
from pyro import poutine
from pyro.nn import pyro_method
from scipy import stats
from test_bounds import Linear
from test_models import TABLE, Row, built, draw, images, replace_encode
from torch import Tensor, nn

from pyro_scenes import calibration, checkpoint, cli, plots, report
from pyro_scenes.config import make_config
from pyro_scenes.errors import UserError
from pyro_scenes.likelihoods import NormalImage
from pyro_scenes.models import SceneModel
from pyro_scenes.objectives import OBJECTIVES, Objective, Schedule
from pyro_scenes.plots import calibration as drawing

MODELS = ["lavae", "discrete-air", "discrete-air, paper's networks", "air", "conv-vae"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def uniform(values: Tensor) -> bool:
    """Whether ranks (N, Q) pass a Kolmogorov test of each number, at one in a thousand in all."""
    columns = [column[~column.isnan()].numpy() for column in values.unbind(1)]
    return all(stats.kstest(c, "uniform").pvalue > 1e-3 / len(columns) for c in columns)


# --- without objects -----------------------------------------------------------------------------


def linear(wide: float = 1.0, off: float = 0.0) -> Linear:
    """A linear Gaussian model whose guide has so many times the exact posterior's deviation."""
    model = Linear(wide)
    if off:
        posterior = model.posterior
        model.posterior = lambda x: posterior(x) + off * model.scale
    return model


def test_the_exact_posterior_has_uniform_ranks() -> None:
    found = calibration.measure(linear(), 1500, 50)
    assert found.counts is None and found.given is None
    assert {name: v.shape for name, v in found.values.items()} == dict.fromkeys(
        ("z_0", "z_1", "w"), (1500, 1))
    figures = calibration.summary(found)
    assert "counts" not in figures and figures["scenes"] == 1500
    for name, family in figures["ranks"].items():
        assert uniform(found.values[name])
        assert family["distance"] < family["limit"]
        assert family["spread"] == pytest.approx(1.0, abs=0.1)
        assert family["mean"] == pytest.approx(0.5, abs=0.03)
        assert family["covers"]["50%"] == pytest.approx(0.5, abs=0.05)
        assert family["covers"]["90%"] == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("wide, off, spread, mean", [
    (0.6, 0.0, 1.5, 0.5),  # too sure
    (1.7, 0.0, 0.6, 0.5),  # not sure enough
    (1.0, 0.7, 1.0, 0.35),  # off to one side
])
def test_a_guide_that_is_off_is_caught(wide, off, spread, mean) -> None:
    found = calibration.measure(linear(wide, off), 600, 50)
    for name, family in calibration.summary(found)["ranks"].items():
        assert not uniform(found.values[name]) and family["distance"] > family["limit"]
        assert family["mean"] == pytest.approx(mean, abs=0.06)
        if not off:
            assert family["spread"] == pytest.approx(spread, rel=0.25)
            exact = 2 * stats.norm.cdf(wide * stats.norm.ppf(0.95)) - 1
            assert family["covers"]["90%"] == pytest.approx(exact, abs=0.06)


# --- with objects --------------------------------------------------------------------------------

CELLS, SIGMA = (3, 3), 0.8
SHADES = torch.tensor([0.6, 1.0, 1.5])


class Cells(SceneModel):
    """Up to two objects of three shades in nine cells, and a guide by enumeration.

    Its posterior is exact to a power: 1 for the exact one, more for one that is too sure.
    """

    image_shape = (1, *CELLS)
    where_site = "z_loc"

    def __init__(self, power: float = 1.0, backwards: bool = False):
        super().__init__()
        self.likelihood = NormalImage(SIGMA)
        self.power, self.backwards = power, backwards
        self.unused = nn.Parameter(torch.zeros(1))
        objects = list(itertools.product(range(9), range(3)))
        self.scenes: list[tuple] = [()]
        self.scenes += [(one,) for one in objects]
        self.scenes += [(a, b) for a, b in itertools.product(objects, objects) if a[0] != b[0]]
        sizes = torch.tensor([1.0, 27.0, 27.0 * 24.0])
        counts = torch.tensor([len(scene) for scene in self.scenes])
        self.log_prior = nn.Buffer((torch.tensor([0.2, 0.4, 0.4]) / sizes).log()[counts])
        canvas = torch.zeros(len(self.scenes), 9)
        table = torch.zeros(len(self.scenes), 2, 3)  # x, y and shade of each object
        for i, scene in enumerate(self.scenes):
            for j, (place, shade) in enumerate(scene):
                canvas[i, place] += SHADES[shade]
                table[i, j] = torch.tensor([place % 3, place // 3, SHADES[shade]])
        self.table = nn.Buffer(table)
        self.canvas = nn.Buffer(canvas.view(-1, 1, *CELLS))
        self.n = nn.Buffer(counts)

    def sites(self, index: Tensor, backwards: bool) -> None:
        """Sites of the scenes (...) of these numbers."""
        n, values = self.n[index], self.table[index]  # (...), (..., 2, 3)
        if backwards:
            values = torch.where((n == 2)[..., None, None], values.flip(-2), values)
        pyro.sample("n", dist.Delta(n.float()))
        for i, value in enumerate(values.unbind(-2)):
            pyro.sample(f"z_loc_{i}", dist.Delta(value[..., :2], event_dim=1))
            pyro.sample(f"z_app_{i}", dist.Delta(value[..., 2:], event_dim=1))

    @pyro_method
    def model(self, x: Tensor) -> None:
        with pyro.plate("images", len(x), dim=-1):
            index = pyro.sample("index", dist.Categorical(logits=self.log_prior))
            self.sites(index, False)
            pyro.sample("x", self.likelihood(self.canvas[index]), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        squares = ((x[:, None] - self.canvas) / SIGMA).square().sum((2, 3, 4))
        with pyro.plate("images", len(x), dim=-1):
            logits = self.power * (self.log_prior - 0.5 * squares)
            index = pyro.sample("index", dist.Categorical(logits=logits))
            self.sites(index, self.backwards)

    def counts(self, trace: poutine.Trace) -> Tensor:
        return trace.nodes["n"]["value"].long()


@pytest.mark.parametrize("backwards", [False, True])
def test_the_exact_posterior_of_objects_has_uniform_ranks(backwards) -> None:
    """In whatever order the guide finds them."""
    model = Cells(backwards=backwards)
    found = calibration.measure(model, 900, 30)
    assert set(found.values) == {"n", "z_loc", "z_app"}
    assert found.values["n"].shape == (900, 1) and found.values["z_loc"].shape == (900, 2)
    empty = found.counts == 0
    assert 0.15 < empty.double().mean() < 0.25
    assert found.values["z_loc"][empty].isnan().all()
    assert found.values["z_loc"][~empty].isnan().double().mean() < 0.01
    for values in found.values.values():
        assert uniform(values)
    figures = calibration.summary(found)
    counts = figures["counts"]
    assert counts["right"] == pytest.approx(counts["sure"], abs=0.04)
    assert sum(part["scenes"] for part in counts["by count"].values()) == 900
    # The mass of the true count is, on average, that of a count with the posterior's masses.
    expected = found.given.square().sum(1).mean()
    own = found.given.gather(1, found.counts[:, None]).mean()
    assert own == pytest.approx(float(expected), abs=0.04)


def test_a_posterior_of_objects_that_is_too_sure_is_caught() -> None:
    found = calibration.measure(Cells(power=3.0), 600, 30)
    for name, values in found.values.items():
        assert not uniform(values), name
    figures = calibration.summary(found)
    assert figures["counts"]["sure"] > figures["counts"]["right"] + 0.1
    assert figures["ranks"]["z_app"]["spread"] > 1.2


def test_objects_that_no_draw_of_the_guide_has_are_not_ranked() -> None:
    class Blind(Cells):
        @pyro_method
        def guide(self, x: Tensor) -> None:
            with pyro.plate("images", len(x), dim=-1):
                pyro.sample("n", dist.Delta(x.new_zeros(len(x))))

    found = calibration.measure(Blind(), 50, 9)
    assert found.values["n"].isfinite().all() and found.counts.any()
    for name, width in (("z_loc", 2), ("z_app", 1)):
        assert found.values[name].shape == (50, width) and found.values[name].isnan().all()
    assert set(calibration.summary(found)["ranks"]) == {"n"}
    assert found.given[:, 0].tolist() == [1.0] * 50


def test_the_limit_is_what_one_in_a_hundred_calibrated_guides_exceeds() -> None:
    """By its number that is worst of three, of which one has fewer values than the others."""
    values = torch.rand(500, 3).double()
    values[:100, 1] = math.nan
    figures = calibration.summary(calibration.Ranks({"z": values}))["ranks"]["z"]
    assert (figures["numbers"], figures["scenes"]) == (3, 400)
    assert figures["limit"] == pytest.approx(stats.kstwo.isf(0.01 / 3, 400), rel=0.02)
    distances = [stats.kstest(column[~column.isnan()], "uniform").statistic
                 for column in values.unbind(1)]
    assert figures["distance"] == pytest.approx(max(distances), abs=1e-6)


def test_ranks_by_hand() -> None:
    truth = torch.tensor([[2.0, math.nan], [2.0, 5.0], [0.0, 1.0]]).double()
    drawn = torch.tensor([[[1.0, 3.0], [2.0, math.nan], [math.nan, 2.0]],
                          [[1.5, 3.0], [2.0, 7.0], [math.nan, 3.0]],
                          [[3.0, 3.0], [2.0, 4.0], [math.nan, 4.0]]]).double()
    found = torch.stack([calibration.rank(truth, drawn) for _ in range(400)])
    low, high = found.amin(0), found.amax(0)
    assert found[:, 0, 1].isnan().all() and found[:, 2, 0].isnan().all()
    # Two of three draws below: the third quarter. All alike: anywhere. One of two: the middle.
    for (row, column), (least, most) in {
        (0, 0): (0.5, 0.75), (1, 0): (0.0, 1.0), (1, 1): (1 / 3, 2 / 3), (2, 1): (0.0, 0.25),
    }.items():
        assert least <= low[row, column] < least + 0.05 * (most - least)
        assert most - 0.05 * (most - least) < high[row, column] <= most


def test_the_leftmost_object_is_the_one_that_is_there() -> None:
    """By column, then by row; whatever absent objects are."""
    model = Cells()
    indices = [model.scenes.index(scene) for scene in
               (((4, 0), (3, 2)), ((7, 1), (1, 2)), ((5, 0),), ())]

    def scenes() -> None:
        with pyro.plate("images", 4, dim=-1):
            model.sites(torch.tensor(indices), False)

    found = calibration.numbers(model, poutine.trace(scenes).get_trace())
    assert found["n"].flatten().tolist() == [2, 2, 1, 0]
    assert found["z_loc"][:3].tolist() == [[0, 1], [1, 0], [2, 1]]
    assert found["z_app"][:3].flatten().tolist() == pytest.approx([1.5, 1.5, 0.6])
    assert found["z_loc"][3].isnan().all() and found["z_app"][3].isnan().all()


@pytest.mark.parametrize("name, column", [
    ("lavae", None), ("air", 1), ("discrete-air", 3), ("discrete-air, paper's networks", 3),
])
def test_the_leftmost_object_of_a_model_by_its_own_sites(name, column) -> None:
    """x is the number of a place among columns, or a column of z_where."""
    model = built(replace(TABLE[name], training={})).eval()
    trace, x = calibration.simulate(model, 60)
    found, chosen, width = calibration.numbers(model, trace), set(), x.shape[-1]

    def of(site: str, t: int, b: int) -> list[float]:
        value = trace.nodes[f"{site}_{t}"]["value"][b]
        if site == "z_loc":
            return [int(value.argmax()) % width, int(value.argmax()) // width]
        return [int(value.argmax())] if site == "z_cat" else value.tolist()

    where = "z_loc" if column is None else "z_where"
    for b, count in enumerate(model.counts(trace).tolist()):
        across = [of(where, t, b)[column or 0:][:2] for t in range(count)]
        for site in set(found) - {"n"}:
            if count:
                t = across.index(min(across))
                chosen.add(t)
                assert found[site][b].tolist() == of(site, t, b), site
            else:
                assert found[site][b].isnan().all()
    assert {where, model.appearance_site} <= set(found) and {0, 1} <= chosen
    assert ("z_cat" in found) == name.startswith("discrete")


# --- our models ----------------------------------------------------------------------------------


@pytest.fixture(params=MODELS)
def row(request: pytest.FixtureRequest) -> Row:
    return replace(TABLE[request.param], training={})


def test_every_model_is_measured_and_left_as_it_is(row) -> None:
    model = replace_encode(built(row)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = calibration.measure(model, 12, 9, seed=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again, other = (calibration.measure(model, 12, 9, seed=seed) for seed in (3, 4))
    for name, values in found.values.items():
        assert len(values) == 12
        known = values[~values.isnan()]
        assert ((known >= 0) & (known <= 1)).all() and len(known)
        assert torch.equal(values.nan_to_num(-1), again.values[name].nan_to_num(-1))
    assert any(not torch.equal(v.nan_to_num(-1), other.values[k].nan_to_num(-1))
               for k, v in found.values.items())
    assert json.loads(json.dumps(calibration.summary(found), allow_nan=False))
    if found.counts is not None:
        assert torch.allclose(found.given.sum(1), torch.ones(12).double())


def test_the_generative_models_parameters_are_those_of_its_density(row) -> None:
    """By their gradients: the joint density's are generative, the guide's density's are not."""
    model, x = built(row), images()
    guide = row.guide(model)
    values = draw(guide, x)
    for name, value in values.items():  # objects that are there, all of them
        if name.startswith("z_pres"):
            here = torch.ones(len(x))
            values[name] = here if value.dim() == 1 else torch.stack([1 - here, here], -1)
    generative = {id(p) for p in model.generative()}
    reached = []
    for function in (model.model, guide):
        model.zero_grad()
        trace = poutine.trace(poutine.condition(function, data=values)).get_trace(x)
        trace.log_prob_sum().backward()
        reached.append({id(p) for p in model.parameters() if p.grad is not None and p.grad.any()})
    assert reached[0] and reached[0] <= generative
    assert reached[1] and not reached[1] & generative


@pytest.mark.parametrize("name, settings", [
    ("lavae", ["sprite=5", "crop=7", "location_width=8", "location_blocks=1", "latent=2",
               "appearance_width=4", "appearance_hidden=6", "sprite_hidden=5",
               "count_threshold=0.01"]),
    ("air", ["window=8", "latent=2", "decoder_hidden=5", "encoder_hidden=6", "hidden=7",
             "glimpse=8", "glimpse_width=2"]),
    ("discrete-air", ["window=8", "code=5", "decoder_hidden=6", "hidden=7", "glimpse=8",
                      "glimpse_width=2", "angles=8"]),
    ("conv-vae", ["grid_latent=2", "grid_stages=2", "grid_width=8"]),
    ("conv-vae", ["grid_latent=2", "grid_stages=2", "grid_width=8", "networks=paper"]),
])
def test_a_training_of_the_guide_moves_the_guide_alone(name, settings) -> None:
    config = make_config(name, "multi-dsprites", settings=settings)
    model = checkpoint.build(config, (3, 12, 8)).eval()
    running = {n: b.clone() for n, b in model.named_buffers() if n.startswith("decoder.")}
    objective = OBJECTIVES[name][0](config.schedule, model, 100)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generative = {id(p) for p in model.generative()}
    calibration.train(model, objective, 2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    fixed = {name for name, p in model.named_parameters() if id(p) in generative}
    assert fixed and not fixed & moved and moved
    # Norms of batches too: of another decoder the guide would learn another posterior.
    assert all(torch.equal(dict(model.named_buffers())[n], b) for n, b in running.items())
    assert ("networks=paper" in settings) == any("running" in n for n in running)
    assert all(p.requires_grad for p in model.parameters()) and not model.training


def test_a_training_of_the_guide_that_fails_leaves_the_mode(monkeypatch) -> None:
    config = make_config("conv-vae", "multi-dsprites", settings=["grid_latent=2", "grid_width=8"])
    model = checkpoint.build(config, (3, 16, 16)).eval()
    objective = OBJECTIVES["conv-vae"][0](config.schedule, model, 100)
    lost = torch.tensor(math.nan, requires_grad=True)
    monkeypatch.setattr(objective, "loss", lambda *given: (lost, {"loss": math.nan}))
    with pytest.raises(UserError, match="not finite"):
        calibration.train(model, objective, 1)
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_a_guide_that_finds_nothing_is_left_as_it_is() -> None:
    """LAVAE's count is a point mass: without objects its bound has no gradient."""
    config = make_config("lavae", "multi-dsprites", settings=["count_threshold=3.9"])
    model = checkpoint.build(config, (3, 16, 16)).eval()
    before = [p.detach().clone() for p in model.parameters()]
    calibration.train(model, OBJECTIVES["lavae"][0](config.schedule, model, 100), 1)
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before))


def test_a_training_of_the_guide_makes_it_calibrated() -> None:
    """Of a linear Gaussian model whose guide can be the exact posterior, and begins far from it."""

    class Learning(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.decoders = ("weight",)
            apart, _ = torch.linalg.qr(self.weight.detach())  # so that the posterior factorises
            self.weight.data = apart * torch.tensor([1.5, 1.0, 0.5])
            self.learned = nn.Parameter(0.3 * self.read)
            self.log_scale = nn.Parameter(torch.full((3,), -2.0).double())

        @pyro_method
        def guide(self, x: Tensor) -> None:
            mean, scale = x.flatten(1) @ self.learned.T, self.log_scale.exp()
            with pyro.plate("images", len(x), dim=-1):
                for i, name in enumerate(("z_0", "z_1", "w")):
                    site = dist.Normal(mean[:, i:i + 1], scale[i]).to_event(1)
                    pyro.sample(name, site)

    model = Learning()
    weight = model.weight.detach().clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "RATE", 0.05)
        before = calibration.summary(calibration.measure(model, 400, 50))["ranks"]
        calibration.train(model, Objective(Schedule(), model, 300), 300)
    after = calibration.summary(calibration.measure(model, 400, 50))["ranks"]
    assert torch.equal(model.weight, weight)
    for name in before:
        assert before[name]["spread"] > 1.5 and before[name]["distance"] > before[name]["limit"]
        assert after[name]["spread"] == pytest.approx(1.0, abs=0.15)
        assert after[name]["distance"] < after[name]["limit"]


# --- what is printed and drawn -------------------------------------------------------------------


def test_bars_are_one_high_for_uniform_ranks_and_intervals_cover_their_mass() -> None:
    even = (torch.arange(1200).double() + 0.5)[:, None] / 1200
    sure = torch.cat([torch.zeros(600), torch.ones(600)]).double()[:, None]
    sure[:300] = math.nan
    figure = plots.calibration_figure({"a": {"z": even, "w": sure}, "b": {"z": sure, "w": even}})
    assert len(figure.axes) == 6
    covered, first, second = figure.axes[:3]
    (band, *bars), (_, *others) = (
        [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        for axes in (first, second)
    )
    heights = [bar.get_height() for bar in bars]
    assert heights == pytest.approx([1.0] * drawing.BINS)
    ends = [bar.get_height() for bar in others]
    assert ends[0] == pytest.approx(drawing.BINS / 3) and sum(ends[1:-1]) == 0
    low, high = stats.binom.interval(0.99, 1200, 1 / drawing.BINS)
    assert band.get_height() == pytest.approx((high - low) * drawing.BINS / 1200)
    lines = {line.get_label(): line.get_xydata() for line in covered.lines}
    assert np.allclose(lines["z"][:, 0], lines["z"][:, 1], atol=0.01)
    assert (lines["w"][:100, 1] == 0).all() and lines["w"][100, 1] == 1
    wrong: list[dict] = [{}, {"a": {}}, {"a": {"z": even}, "b": {"w": even}}]
    for bad in wrong:
        with pytest.raises(ValueError, match="same families"):
            plots.calibration_figure(bad)


def calibrated(*words: str):
    return CliRunner().invoke(cli.calibrate, words)


def test_svi_calibrate_prints_draws_and_writes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- svi-calibrate lavae-multi-dsprites --readme -->\nold\n"
                    "<!-- end of svi-calibrate lavae-multi-dsprites -->\nAfter.\n")
    path = checkpoint.find("lavae-multi-dsprites")
    kept = path.read_bytes()
    result = calibrated("lavae-multi-dsprites", "--scenes", "3", "--draws", "4", "--train", "1",
                        "--figure", "ranks.png", "--json", "ranks.json", "--readme", "page.md")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "ranks.json").read_text())
    assert found["checkpoint"] == "lavae-multi-dsprites" and found["draws"] == 4
    assert list(found["guides"]) == ["as trained", "1 steps on its own scenes"]
    text = report.calibration(found["guides"])
    assert text in result.stdout
    with Image.open("ranks.png") as picture:
        assert min(picture.size) > 300
    written = page.read_text()
    assert text in written and "![Ranks](ranks.png)" in written and "old" not in written
    assert written.startswith("Before.\n") and written.endswith("After.\n")
    assert "--scenes 3 --draws 4 --train 1`" in written
    assert path.read_bytes() == kept


@pytest.mark.parametrize("words, reason", [
    (("nothing",), "nothing"),
    (("lavae-multi-dsprites", "--figure", "ranks.txt"), "end its name in"),
    (("lavae-multi-dsprites", "--json", "kept.json"), "kept.json exists"),
    (("lavae-multi-dsprites", "--scenes", "1"), "--scenes"),
    (("lavae-multi-dsprites", "--readme", "kept.json", "--scenes", "2", "--draws", "1"), "lines"),
])
def test_svi_calibrate_refuses_in_one_line(words, reason, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.json").write_text("{}")
    result = calibrated(*words)
    assert result.exit_code == 2 and reason in result.stderr
    assert "Traceback" not in result.output and (tmp_path / "kept.json").read_text() == "{}"
