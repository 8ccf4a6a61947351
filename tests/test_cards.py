"""Shipping: what a card says is what the runs and the evaluation say."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pyro_scenes import cards, checkpoint, cli, report, suite, tables
from pyro_scenes.config import make_config
from pyro_scenes.data import DATASETS, load, save_npz
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import evaluate
from pyro_scenes.models import GenerativeModel, SceneModel
from pyro_scenes.training import train

TINY = ("location_width=8", "location_blocks=1", "appearance_width=4", "appearance_hidden=8",
        "sprite_hidden=8", "latent=2", "batch_size=4", "eval_images=4", "warmup_full=0",
        "warmup_end=0", "one_object=9", "one_object_end=9")  # fmt: skip
TINY_KINDS = ("window=8", "code=4", "decoder_hidden=4", "hidden=4", "glimpse=8", "glimpse_width=2",
              "batch_size=4", "eval_images=4")  # fmt: skip
OWN, CROWDED = "0-3 objects", "7 objects"
SOME = 40  # images


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two seeds of one command, two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        config = make_config("lavae", "multi-dsprites", settings=TINY, steps=2, seed=seed)
        train(config, folder / str(seed), device="cpu", progress=False)
    return [folder / "0", folder / "1"]


def test_what_was_trained_on_a_data_set_has_its_scenes_by_name(runs: list[Path]) -> None:
    assert report.source(checkpoint.load(runs[0]), "elsewhere.npz") == "multi-dsprites"


def test_a_card_holds_the_figures_of_every_seed(runs: list[Path], tmp_path: Path) -> None:
    card = cards.ship("tiny", runs, folder=tmp_path, images=6, particles=2, device="cpu")
    content = json.loads((tmp_path / "tiny.json").read_text())
    assert [run["seed"] for run in content["runs"]] == [0, 1]
    for path, entry in zip(runs, content["runs"], strict=True):
        first = path == runs[0]
        model = checkpoint.load(tmp_path / "tiny.pt" if first else path).model
        checkpoint.rounded(model)
        scenes = load("multi-dsprites", images=6)
        again = evaluate(model, scenes, particles=2, limit=math.inf, progress=False)
        own, crowded = entry["figures"][OWN], entry["figures"][CROWDED]
        assert list(entry["figures"]) == [OWN, CROWDED] and entry["steps"] == 2
        assert own["nll"] == again["nll"] and own["nll_images"] == 6
        assert own["count_accuracy"] == again["count_accuracy"]
        assert crowded["nll"] is None and crowded["data"] == "multi-dsprites"
        assert f"| {entry['seed']} | {own['count_accuracy']:.4f} | {own['nll']:.2f} |" in card
        assert f"| {entry['seed']} | {crowded['count_accuracy']:.4f} |" in card
    # What no row has does not get a column; what the figures are of is said.
    assert "-log p(x) <= (bernoulli)" in card and "correspondence" not in card
    assert "-log p(x) is of all of them, with 2 importance samples" in card
    entropy = content["runs"][0]["figures"][OWN]["entropy"]
    limit = f"the entropy of the data, {entropy['total']:.2f} +- {entropy['stderr']:.2f} nats"
    assert card.count(limit) == 1 and limit in card.split("## 7 objects")[0]
    assert (tmp_path / "tiny.md").read_text() == card
    command = card.partition("Trained by `")[2].partition("`")[0]
    _, _, settings = command.partition(" --preset fast ")
    assert sorted(settings.removesuffix(" --seed SEED").split(" --set ")) == sorted(
        ["--set steps=2", *TINY]
    )
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    shipped = checkpoint.load(tmp_path / "tiny.pt")
    assert shipped.config.seed == 0 and shipped.training is None
    trained = checkpoint.load(runs[0]).model.state_dict()
    for name, value in shipped.model.state_dict().items():
        assert value.dtype == trained[name].dtype
        assert torch.equal(value, trained[name].half().to(value.dtype))
    assert (tmp_path / "tiny.pt").stat().st_size < 2 * sum(v.numel() for v in trained.values()) \
        + 20_000


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
    assert first["figures"][OWN]["nll"] != second["figures"][OWN]["nll"]


def test_figures_of_the_same_weights_are_measured_once(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"images": 3, "particles": 1, "device": "cpu"}
    first = cards.ship("tiny", [runs[0]], folder=tmp_path / "first", **asked)
    monkeypatch.setattr(cards, "evaluate", None)
    assert cards.ship("tiny", [runs[0]], folder=tmp_path / "second", **asked) == first
    with pytest.raises(TypeError):
        cards.ship("tiny", [runs[0]], folder=tmp_path / "third", **asked | {"images": 4})


def test_a_file_of_a_run_is_measured_as_the_run_is(runs: list[Path], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"images": 2, "particles": 1, "device": "cpu"}
    card = cards.ship("tiny", [runs[0] / "checkpoint.pt"], folder=tmp_path / "file", **asked)
    assert cards.ship("tiny", [runs[0]], folder=tmp_path / "run", **asked) == card


def test_a_seed_counts_once(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="same seed: 1, 0, 1"):
        cards.ship("tiny", [runs[1], *runs], folder=tmp_path / "shipped", images=2)
    assert not (tmp_path / "shipped").exists()


def test_a_seed_can_be_added_later(runs: list[Path], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"images": 4, "particles": 2, "device": "cpu"}
    card = cards.ship("tiny", runs, folder=tmp_path / "both", **asked)
    cards.ship("tiny", runs[:1], folder=tmp_path / "one", **asked)
    weights = (tmp_path / "one" / "tiny.pt").read_bytes()
    assert cards.ship("tiny", runs[1:], folder=tmp_path / "one", add=True, **asked) == card
    both, one = ((tmp_path / name / "tiny.json").read_text() for name in ("both", "one"))
    assert one == both and (tmp_path / "one" / "tiny.pt").read_bytes() == weights
    assert (tmp_path / "one" / "tiny.md").read_text() == card


def test_what_cannot_be_added_changes_nothing(runs: list[Path], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"images": 3, "particles": 1, "device": "cpu"}
    cards.ship("tiny", runs[:1], folder=tmp_path, **asked)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = tmp_path.parent / f"{tmp_path.name}-other"
    config = make_config("lavae", "multi-dsprites", settings=TINY, steps=1, seed=1)
    train(config, other, device="cpu", progress=False)
    for name, run, changed, said in (
        ("tiny", runs[0], {}, "same seed: 0, 0"),
        ("tiny", runs[1], {"particles": 2}, "--images 3 --particles 1 --nll-images 3"),
        ("tiny", runs[1], {"images": 4}, "--images 3 --particles 1 --nll-images 3"),
        ("tiny", runs[1], {"nll_images": 2}, "--images 3 --particles 1 --nll-images 3"),
        ("tiny", other, {}, "other settings than tiny"),
        ("new", runs[1], {}, "new.json"),
    ):
        with pytest.raises(UserError, match=said):
            cards.ship(name, [run], folder=tmp_path, add=True, **asked | changed)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def entry(seed: int, **changed) -> dict:
    figures = {"images": 20, "particles": 2, "nll_images": 20, "nll": 1.0}
    measured = {"seed": seed, "steps": 2, "training_seconds": 3, "machine": "a cpu"}
    return measured | {"figures": {OWN: figures}} | changed


@pytest.mark.parametrize("nll, kept, asked, alike", [
    (1.0, 20, None, True), (1.0, 20, 20, True), (1.0, 20, 50, True), (1.0, 20, 10, False),
    (1.0, 10, 10, True), (1.0, 10, None, False),
    (None, None, None, True), (None, None, 10, True),  # images of which there is no density
])
def test_which_measures_are_alike(nll, kept, asked, alike) -> None:
    before = {"name": "tiny", "runs": [entry(0)]}
    before["runs"][0]["figures"][OWN] |= {"nll": nll, "nll_images": kept}
    if alike:
        cards._measured_alike(before, 20, 2, asked)
    else:
        with pytest.raises(UserError, match=f"--images 20 --particles 2 --nll-images {kept}"):
            cards._measured_alike(before, 20, 2, asked)


@pytest.mark.parametrize("damaged", [
    [], {}, "runs", [1], [{}], [entry(0, figures={})], [entry(0, figures=[1])],
    [entry(0, figures={OWN: None})], [entry(0), entry(1, figures={CROWDED: {}})],
])
def test_a_damaged_card_is_told(damaged: Any, runs: list[Path], tmp_path: Path) -> None:
    cards.ship("tiny", runs[:1], folder=tmp_path, images=2, particles=1, device="cpu")
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runs": damaged}))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"tiny.json is not what it should be \(its runs\)"):
        cards.ship("tiny", runs[1:], folder=tmp_path, images=2, particles=1, add=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("ending, said", [
    (".pt", "of no checkpoint"), (".png", "tiny.png is missing: ship all seeds anew"),
])
def test_seeds_are_not_added_to_what_is_not_whole(
    ending: str, said: str, runs: list[Path], tmp_path: Path
) -> None:
    cards.ship("tiny", runs[:1], folder=tmp_path, images=2, particles=1, device="cpu")
    (tmp_path / f"tiny{ending}").unlink()
    with pytest.raises(UserError, match=said):
        cards.ship("tiny", runs[1:], folder=tmp_path, images=2, particles=1, add=True)


def test_seeds_of_other_scenes_are_not_added(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"folder": tmp_path, "images": 2, "particles": 1, "device": "cpu"}
    cards.ship("tiny", runs[:1], **asked)
    before = (tmp_path / "tiny.json").read_bytes()
    held_out = cards.held_out
    run = tmp_path / "run"
    shutil.copytree(runs[1], run, ignore=shutil.ignore_patterns("figures-*"))
    monkeypatch.setattr(
        cards, "held_out", lambda *given: dict(list(held_out(*given).items())[:1])
    )
    with pytest.raises(UserError, match="measured on other scenes than those of now"):
        cards.ship("tiny", [run], add=True, **asked)
    assert (tmp_path / "tiny.json").read_bytes() == before


def test_scenes_without_counts_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DATASETS["multi-dsprites"]

    def pixels_alone(*given: Any) -> dict:
        return {"pixels": spec.scenes(*given)["pixels"]}

    alone = replace(spec, name="alone", scenes=pixels_alone, crowded=False)
    monkeypatch.setitem(DATASETS, "alone", alone)
    config = make_config("lavae", "alone", settings=TINY, steps=1)
    train(config, tmp_path / "run", device="cpu", progress=False)
    cards.ship("tiny", [tmp_path / "run"], folder=tmp_path, images=8, particles=1, device="cpu")
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.delitem(DATASETS, "alone")
    assert "| [tiny](" in cards.table(tmp_path)  # where it is not registered, too


def test_add_alone_is_refused() -> None:
    result = CliRunner().invoke(cli.ship, ["--add", "--readme", "README.md"])
    assert result.exit_code == 2 and "--add is of a NAME and RUNS" in result.output


def test_what_was_trained_on_a_file_does_not_ship(tmp_path: Path) -> None:
    save_npz(tmp_path / "mine.npz", load("multi-dsprites", images=20))
    config = make_config("lavae", str(tmp_path / "mine.npz"), settings=TINY, steps=1)
    train(config, tmp_path / "run", device="cpu", progress=False)
    with pytest.raises(UserError, match="trained on a registered data set"):
        cards.ship("tiny", [tmp_path / "run"], folder=tmp_path / "shipped", images=2)


def test_a_name_without_runs_is_refused() -> None:
    result = CliRunner().invoke(cli.ship, ["tiny"])
    assert result.exit_code == 2 and "give a NAME and RUNS, or --readme" in result.output


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


def test_files_that_are_no_checkpoints_are_left(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("precious")
    with pytest.raises(UserError, match="README.md is there already"):
        cards.ship("README", runs[:1], folder=tmp_path, images=2)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "precious"


def test_the_table_goes_between_its_marks(monkeypatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = "<!-- svi-ship --readme -->\n{}\n<!-- end of svi-ship -->"
    monkeypatch.setattr(cards, "table", lambda: "new")
    rewritten: list[bool] = []
    monkeypatch.setattr(cards, "rewrite", lambda: rewritten.append(True))
    for old in (marks.format("old"), marks.format("").replace("\n\n", "\n")):
        page.write_text(f"before\n{old}\nafter\n")
        result = CliRunner().invoke(cli.ship, ["--readme", str(page)])
        assert result.exit_code == 0 and rewritten.pop()
        assert page.read_text() == f"before\n{marks.format('new')}\nafter\n"
    link = tmp_path / "link.md"
    link.symlink_to(page)
    page.write_bytes(f"é\n{marks.format('old')}\nafter\n".replace("\n", "\r\n").encode())
    monkeypatch.setattr(cards, "table", lambda: "new\nlines")
    assert CliRunner().invoke(cli.ship, ["--readme", str(link)]).exit_code == 0
    rewritten.clear()
    now = f"é\n{marks.format('new|lines')}\nafter\n".replace("|", "\n").replace("\n", "\r\n")
    assert page.read_bytes() == now.encode() and link.is_symlink()
    page.write_bytes(b"\xff" + page.read_bytes())
    result = CliRunner().invoke(cli.ship, ["--readme", str(page)])
    assert result.exit_code == 2 and "UTF-8" in result.output
    page.write_text("no marks")
    result = CliRunner().invoke(cli.ship, ["--readme", str(page)])
    assert result.exit_code == 2 and result.output.startswith("Error: ")
    assert page.read_text() == "no marks" and not rewritten


def test_the_shipped_table_has_a_row_a_checkpoint(runs: list[Path], tmp_path: Path) -> None:
    cards.ship("tiny", runs, folder=tmp_path, images=2, particles=2, device="cpu")
    content = json.loads((tmp_path / "tiny.json").read_text())
    # A model of few objects that has categories, and two seeds that differ.
    figures = [run["figures"].pop(OWN) for run in content["runs"]]
    for i, (run, row) in enumerate(zip(content["runs"], figures, strict=True)):
        row |= {"category_correspondence": 0.5 + i / 4, "likelihood": "normal, sigma 0.3"}
        row |= {"nll": 10.0 + 2 * i, "count_accuracy": 0.9 - 0.01 * i}
        run["figures"] = {"0-2 objects": row}
    (tmp_path / "twin.json").write_text(json.dumps(content | {"name": "twin"}))
    headings, rule, first, second = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in cards.table(tmp_path).splitlines()
    )
    assert headings == [
        "checkpoint", "seeds", "count right", "count right, 7 objects", "correspondence",
        "-log p(x) <=", "its error over images", "training, minutes",
    ]
    assert set(rule) == {"---"} and first[0].startswith("[tiny](") and first[1] == "2"
    assert first[3] != "-" == first[4] and first[5].endswith("(bernoulli)")
    assert second[3] == "-" and second[4] == "0.6250 +- 0.1768"
    assert second[5] == "11.0 +- 1.4 (normal, sigma 0.3)"
    # One of the seeds has 90% of counts right.
    assert "1 of 2 seeds succeeded, that is, got at least 90% of counts" in cards._card(content)


def test_a_card_of_categories_has_their_figures(tmp_path: Path) -> None:
    config = make_config("discrete-air", "multi-sprites", settings=TINY_KINDS, steps=2)
    train(config, tmp_path / "run", device="cpu", progress=False)
    result = CliRunner().invoke(cli.ship, [
        "kinds", str(tmp_path / "run"), *"--images 5 --nll-images 2 --particles 2".split(),
        "--device", "cpu", "--out", str(tmp_path / "shipped"),
    ])
    assert result.exit_code == 0, result.output
    card = (tmp_path / "shipped" / "kinds.md").read_text()
    [entry] = json.loads((tmp_path / "shipped" / "kinds.json").read_text())["runs"]
    row = entry["figures"][OWN]
    assert list(entry["figures"]) == [OWN, "small objects"] and "## 7 objects" not in card
    assert "## small objects\n\n5 held-out scenes of multi-sprites-small." in card
    assert "entropy" not in card  # grey images have a density, without that limit
    assert (row["images"], row["nll_images"]) == (5, 2)
    assert "5 held-out scenes of multi-sprites. -log p(x) is of 2 of them" in card
    for heading in ("correspondence", "right in place", "purity", "-log p(x) <= (normal, sigma 0."):
        assert f"| {heading}" in card
    assert f"| {row['category_correspondence']:.4f} |" in card


def test_a_card_of_a_model_without_objects_has_its_likelihood(tmp_path: Path) -> None:
    settings = ("grid_latent=2", "grid_stages=2", "grid_width=8", "batch_size=4", "eval_images=4")
    config = make_config("conv-vae", "multi-dsprites", settings=settings, steps=2)
    train(config, tmp_path / "run", device="cpu", progress=False)
    card = cards.ship("tiny", [tmp_path / "run"], folder=tmp_path, images=4, particles=2,
                      device="cpu")
    assert "-log p(x) <= (bernoulli)" in card and "## 0-3 objects" in card
    assert "count" not in card and "succeeded" not in card and "7 objects" not in card
    assert cards.table(tmp_path).splitlines()[-1].count(" - ") == 3


@pytest.mark.parametrize("most, data, labels", [
    (math.inf, "multi-dsprites", {OWN: "multi-dsprites", CROWDED: "multi-dsprites"}),
    (7, "multi-mnist-10k", {OWN: "multi-mnist-10k", CROWDED: "multi-mnist-10k"}),
    (6, "multi-mnist-1k", {OWN: "multi-mnist-1k"}),
    (math.inf, "multi-sprites", {OWN: "multi-sprites", "small objects": "multi-sprites-small"}),
    (2, "multi-mnist", {"0-2 objects": "multi-mnist", "new digits": "multi-mnist-new-digits"}),
    (None, "multi-dsprites", {OWN: "multi-dsprites"}),
])  # fmt: skip
def test_what_a_model_is_measured_on(most, data, labels, monkeypatch) -> None:
    asked = []

    def noted(name, **options):
        asked.append(options.get("objects"))
        return f"{options['images']} images of {name}"

    monkeypatch.setattr(report, "load", noted)
    model = SceneModel() if most else GenerativeModel()
    model.most = most
    config = replace(make_config("conv-vae", "multi-dsprites"), data=data)
    trained = checkpoint.Checkpoint(model, config, 0, Path("run"), None)
    found = report.held_out(trained, 5, None)
    assert found == {label: f"5 images of {name}" for label, name in labels.items()}
    assert asked == [(7, 7) if label == CROWDED else None for label in labels]


def test_new_digits_are_measured_and_drawn_apart(tmp_path: Path, made_up_mnist: Path) -> None:
    settings = (*TINY_KINDS, "classes=2", "attributes=0")
    config = make_config("discrete-air", "multi-mnist", settings=settings, steps=1)
    train(config, tmp_path / "run", device="cpu", progress=False, mnist=made_up_mnist)
    options: dict[str, Any] = {"folder": tmp_path / "shipped", "images": 3, "particles": 2}
    card = cards.ship("digits", [tmp_path / "run"], mnist=made_up_mnist, device="cpu", **options)
    [entry] = json.loads((tmp_path / "shipped" / "digits.json").read_text())["runs"]
    own, new = entry["figures"].values()
    assert new["data"] == "multi-mnist-new-digits" and new["nll"] not in (None, own["nll"])
    assert "## new digits" in card and f"| {new['nll']:.2f} |" in card
    assert "training, minutes" in card.split("## new digits")[0]
    assert "training, minutes" not in card.split("## new digits")[1]


def test_cards_are_written_anew_from_their_figures(runs: list[Path], tmp_path: Path) -> None:
    card = cards.ship("tiny", runs, folder=tmp_path, images=2, particles=0, device="cpu")
    (tmp_path / "tiny.md").write_text("old")
    cards.rewrite(tmp_path)
    assert (tmp_path / "tiny.md").read_text() == card


def test_shipped_cards_and_the_readme_say_what_the_figures_say() -> None:
    shipped = sorted(checkpoint.SHIPPED.glob("*.json"))
    assert shipped
    for path in shipped:
        assert path.with_suffix(".md").read_text() == cards._card(json.loads(path.read_text()))
    assert cards.table() in (Path(__file__).parent.parent / "README.md").read_text()


def test_a_bound_has_both_of_its_errors() -> None:
    """Over seeds, and over the images of one, of which there may be few."""
    figures = [{"nll": nll, "nll_stderr": error, "nll_images": 1200, "likelihood": "bernoulli"}
               for nll, error in ((70.0, 3.0), (72.0, 5.0))]
    assert tables.bound(figures) == "71.0 +- 1.4 (bernoulli)"
    assert tables.images_error(figures) == "4.0 of 1,200"
    assert tables.images_error([{"nll": None, "nll_stderr": None}]) == "-"


@pytest.mark.parametrize("classes,said", [(3, "0.4500 +- 0.0707"),
                                          (5, "0.4500 +- 0.0707 (5 categories for 3)")])
def test_more_categories_than_labels_are_said(classes: int, said: str) -> None:
    content = {"settings": {"data": "multi-dsprites", "net": {"classes": classes}}}
    figures = [{"category_correspondence": value} for value in (0.4, 0.5)]
    assert cards.correspondence(content, figures) == said
    assert cards.correspondence(content, [{"category_correspondence": None}]) == "-"


@pytest.mark.parametrize("machines,said", [
    (["cpu, torch 2, 2 processes"] * 2, "torchrun --nproc-per-node 2 "),
    (["cpu, torch 2", "cpu, torch 2"], ""),
    (["cpu, torch 2, 2 processes", "cpu, torch 2, 4 processes"], ""),  # no one command
])
def test_a_command_begins_with_its_processes(machines: list[str], said: str) -> None:
    assert cards._launcher([{"machine": machine} for machine in machines]) == said


@pytest.mark.parametrize("name", sorted(checkpoint.shipped()))
def test_what_ships_is_as_good_as_its_card_says(name: str, request) -> None:
    """The first of the test scenes that the card is of: weights and code belong together."""
    [(_, told), *_] = json.loads((checkpoint.SHIPPED / f"{name}.json").read_text())["runs"][0][
        "figures"].items()
    mnist = request.getfixturevalue("mnist_folder") if "mnist" in told["data"] else None
    found = evaluate(checkpoint.load(name).model, load(told["data"], images=SOME, mnist=mnist),
                     particles=10, limit=math.inf, progress=False)
    # Of ten particles, too; the oldest cards have a hundred alone.
    ten = next((point for point in told.get("curve", ()) if point["particles"] == 10), told)
    error = ten["nll_stderr"] * math.sqrt(told["nll_images"] / SOME)
    assert abs(found["nll"] - ten["nll"]) < 3 * error
    if told["count_accuracy"] is not None:
        assert found["count_accuracy"] >= 0.95


def test_the_results_say_what_their_files_say() -> None:
    """Of the suite, in the repository: no figure there is typed."""
    root = Path(__file__).parent.parent
    assert suite.page(root / "results") == (root / "RESULTS.md").read_text()
    assert suite.head(root / "results") in (root / "README.md").read_text()
