"""Shipping: what a card says is what the runs and the evaluation say."""

import json
import math
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyro_scenes import cards, checkpoint, cli
from pyro_scenes.config import make_config
from pyro_scenes.data import load
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import evaluate
from pyro_scenes.training import train

TINY = ("location_width=8", "location_blocks=1", "appearance_width=4", "appearance_hidden=8",
        "sprite_hidden=8", "latent=2", "batch_size=4", "eval_images=4", "warmup_full=0",
        "warmup_end=0", "one_object=9", "one_object_end=9")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two seeds of one command, two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        config = make_config("lavae", "multi-dsprites", settings=TINY, steps=2, seed=seed)
        train(config, folder / str(seed), device="cpu", progress=False)
    return [folder / "0", folder / "1"]


def test_a_card_holds_the_figures_of_every_seed(runs: list[Path], tmp_path: Path) -> None:
    card = cards.ship("tiny", runs, folder=tmp_path, images=6, particles=2, device="cpu")
    content = json.loads((tmp_path / "tiny.json").read_text())
    assert [run["seed"] for run in content["runs"]] == [0, 1]
    for path, entry in zip(runs, content["runs"], strict=True):
        model = checkpoint.load(path).model
        scenes = load("multi-dsprites", images=6)
        again = evaluate(model, scenes, particles=2, limit=math.inf, progress=False)
        assert entry["few"]["nll"] == again["nll"]
        assert entry["few"]["count_accuracy"] == again["count_accuracy"]
        assert entry["crowded"]["nll"] is None and entry["crowded"]["data"] == "multi-dsprites"
        assert f"{entry['few']['nll']:.2f}" in card and entry["steps"] == 2
    assert (tmp_path / "tiny.md").read_text() == card
    _, _, settings = content["command"].partition(" --preset fast ")
    assert sorted(settings.removesuffix(" --seed SEED").split(" --set ")) == sorted(
        ["--set steps=2", *TINY]
    )
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    shipped = checkpoint.load(tmp_path / "tiny.pt")
    assert shipped.config.seed == 0 and shipped.training is None
    assert all(
        (value == checkpoint.load(runs[0]).model.state_dict()[name]).all()
        for name, value in shipped.model.state_dict().items()
    )


def test_figures_of_other_weights_are_not_used_again(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    cards.ship("tiny", [run], folder=tmp_path / "first", images=2, particles=2, device="cpu")
    shutil.copy(runs[1] / "checkpoint.pt", run)
    cards.ship("tiny", [run], folder=tmp_path / "second", images=2, particles=2, device="cpu")
    first, second = (
        json.loads((tmp_path / name / "tiny.json").read_text())["runs"][0]
        for name in ("first", "second")
    )
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["few"]["nll"] != second["few"]["nll"]


def test_runs_of_different_commands_do_not_share_a_card(runs: list[Path], tmp_path: Path) -> None:
    other = make_config("lavae", "multi-dsprites", settings=(*TINY, "latent=3"), steps=2)
    train(other, tmp_path / "other", device="cpu", progress=False)
    with pytest.raises(UserError, match="other settings"):
        cards.ship("tiny", [runs[0], tmp_path / "other"], folder=tmp_path / "shipped", images=2)
    assert not (tmp_path / "shipped").exists()


def test_weights_without_their_training_cannot_ship(runs: list[Path], tmp_path: Path) -> None:
    trained = checkpoint.load(runs[0])
    checkpoint.save(tmp_path / "checkpoint.pt", trained.config, trained.model, trained.step)
    with pytest.raises(UserError, match="not a finished run"):
        cards.ship("tiny", [tmp_path], folder=tmp_path / "shipped", images=2)


def test_the_table_goes_between_its_marks(monkeypatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = "<!-- svi-ship --readme -->\n{}\n<!-- end of svi-ship -->"
    page.write_text(f"before\n{marks.format('old')}\nafter\n")
    monkeypatch.setattr(cards, "table", lambda: "new")
    result = CliRunner().invoke(cli.ship, ["--readme", str(page)])
    assert result.exit_code == 0
    assert page.read_text() == f"before\n{marks.format('new')}\nafter\n"
    page.write_text("no marks")
    result = CliRunner().invoke(cli.ship, ["--readme", str(page)])
    assert result.exit_code == 2 and result.output.startswith("Error: ")
    assert page.read_text() == "no marks"


def test_the_shipped_table_has_a_row_a_checkpoint(runs: list[Path], tmp_path: Path) -> None:
    cards.ship("tiny", runs, folder=tmp_path, images=2, particles=2, device="cpu")
    shutil.copy(tmp_path / "tiny.json", tmp_path / "twin.json")
    lines = cards.table(tmp_path).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| [tiny](") and "| 2 |" in lines[2]
