"""Settings by name: which part they are of, what they are, and which values they take."""

import math
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner

from pyro_scenes import cli, sweep
from pyro_scenes.config import CHOICES, RunConfig, TrainConfig, find, make_config, settings, spelled
from pyro_scenes.errors import UserError
from pyro_scenes.models import MODELS
from pyro_scenes.objectives.lavae import LAVAESchedule
from pyro_scenes.training import OPTIMIZERS

COMMON = {"data": "multi-dsprites", "preset": "fast", "steps": None, "settings": (), "images": 2,
          "particles": 1, "device": "cpu", "mnist": None}


def test_a_name_that_two_parts_have_needs_its_part() -> None:
    config = make_config("air", "multi-dsprites", settings=["net.more=0.25", "schedule.more=0.75"])
    assert (config.net.more, config.schedule.more) == (0.25, 0.75)
    with pytest.raises(UserError, match=r"schedule and net: write schedule.more or net.more"):
        make_config("air", "multi-dsprites", settings=["more=0.5"])


def test_a_part_may_stand_before_any_name_of_its_own() -> None:
    config = make_config("lavae", "multi-dsprites", settings=["train.steps=7", "net.latent=3"])
    assert (config.train.steps, config.net.latent) == (7, 3)
    for wrong in ("net.steps=7", "other.steps=7", ".steps=7", "train.=7"):
        with pytest.raises(UserError, match="no setting is called"):
            make_config("lavae", "multi-dsprites", settings=[wrong])


@pytest.mark.parametrize("changed", [("net.more=0.25",), ("schedule.more=0.75", "net.more=0.1")])
def test_a_command_says_which_part_is_meant(changed: tuple[str, ...]) -> None:
    config = make_config("air", "multi-dsprites", settings=changed)
    words = config.command(0).split()
    given = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert sorted(given) == sorted(changed)
    assert make_config("air", "multi-dsprites", settings=given) == config


def test_a_sweep_reaches_the_part_that_it_names() -> None:
    found = sweep.cells(["net.more=0.2,0.3"], [0], Path("out"), model="air", **COMMON)
    assert [cell.config().net.more for cell in found] == [0.2, 0.3]
    assert {cell.config().schedule.more for cell in found} == {0.9}
    with pytest.raises(UserError, match="twice"):
        sweep.cells(["ramp=1", "schedule.ramp=2"], [0], Path("out"), model="air", **COMMON)


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_is_listed_with_its_value_and_a_word(model: str) -> None:
    config = make_config(model, "multi-mnist-10k")
    found = settings(config)
    assert list(found) == list(RunConfig.parts)
    for part, listed in found.items():
        values = getattr(config, part)
        assert list(listed) == [spelled(config, part, f.name) for f in fields(values)]
        for name, (value, word) in listed.items():
            assert value == getattr(values, name.rpartition(".")[2]) and word, (part, name)
            assert find(config, name)[0] == part


def test_an_optimizer_that_may_be_named_is_there() -> None:
    assert set(CHOICES["optimizer"]) == set(OPTIMIZERS)


def test_a_comment_above_a_setting_is_its_own() -> None:
    listed = settings(make_config("lavae", "multi-dsprites"))["schedule"]
    assert listed["location_decay"][1].startswith("Steps over which the location map's falls")
    assert listed["temperature"][1] == "of the places' Gumbel-softmax gradient"


def test_settings_without_a_source_are_listed_without_words(monkeypatch) -> None:
    """As those of a model that is written in a notebook's cell."""
    written = make_dataclass("Written", [("latent", int, 3)], frozen=True)
    monkeypatch.setitem(MODELS, "written", (None, {"fast": written()}, {}))
    assert settings(make_config("written", "multi-dsprites"))["net"] == {"latent": (3, "")}
    with pytest.raises(UserError, match="no setting is called 'nope'; there are steps"):
        make_config("written", "multi-dsprites", settings=["nope=1"])


@pytest.mark.parametrize("kind, value", [
    (Literal["a", "b"], "a"), (float | None, 2.0), (float | None, None), (int, 2.5), (int, -1),
    (float, math.inf), (str, None), (tuple[int, ...], (1, 2.5)),
])
def test_a_setting_that_could_not_be_read_again_is_refused(kind, value, monkeypatch) -> None:
    written = make_dataclass("Written", [("odd", kind, value)], frozen=True)
    monkeypatch.setitem(MODELS, "written", (None, {"fast": written()}, {}))
    with pytest.raises(UserError, match="odd is .*: a setting is a bool, an int or float"):
        make_config("written", "multi-dsprites")


def test_limits_are_of_the_packages_own_settings(monkeypatch) -> None:
    kinds = [("window", int, 5), ("looks", int, 1000), ("optimizer", str, "mine")]
    written = make_dataclass("Written", kinds, frozen=True)
    monkeypatch.setitem(MODELS, "written", (None, {"fast": written()}, {}))
    config = make_config("written", "multi-dsprites", settings=["window=3"])
    assert (config.net.window, config.net.looks, config.net.optimizer) == (3, 1000, "mine")
    for setting in ("train.optimizer=mine", "train.batch_size=0", f"window={2**17}"):
        with pytest.raises(UserError, match="must be"):
            make_config("written", "multi-dsprites", settings=[setting])


def test_a_preset_without_rows_has_the_defaults(monkeypatch) -> None:
    model, presets, suited = MODELS["lavae"]
    changed = presets | {"big": replace(presets["fast"], latent=99)}
    monkeypatch.setitem(MODELS, "lavae", (model, changed, suited))
    config = make_config("lavae", "multi-dsprites", "big")
    assert config.net.latent == 99
    assert (config.train, config.schedule) == (TrainConfig(), LAVAESchedule())


def test_settings_are_shown_as_the_command_has_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = "--model air --data multi-mnist --settings --set latent=7 --steps 3".split()
    result = CliRunner().invoke(cli.train, line)
    assert result.exit_code == 0, result.output
    lines = [shown.split() for shown in result.output.splitlines()]
    assert ["latent=7", "L,", "dimensions", "of", "z_what"] in lines
    assert any(shown[:1] == ["steps=3"] for shown in lines)
    assert any(shown[:1] == ["net.more=0.5"] for shown in lines)
    assert not list(tmp_path.iterdir())  # nothing is trained
    refused = CliRunner().invoke(cli.train, [*line, "--set", "more=0.3"])
    assert refused.exit_code == 2 and "write schedule.more or net.more" in refused.output


@pytest.mark.parametrize("model,setting,reason", [
    ("lavae", "optimizer=sgd", "optimizer must be one of adam, adamax"),
    ("lavae", "precision=half", "precision must be one of auto, float32, bfloat16"),
    ("lavae", "location_every=17", "location_every must be at most 16"),
    ("air", "place_deviation=0", "place_deviation must be at least 0.001"),
    ("lavae", "crop=3", "crop must be at least 5"),
    ("lavae", "floor=0.5", "floor must be at most 0.49"),
    ("air", "likelihood_floor=0.9", "likelihood_floor must be at most 0.49"),
])
def test_what_would_fail_later_is_refused_at_once(model: str, setting: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make_config(model, "multi-dsprites", settings=[setting])
