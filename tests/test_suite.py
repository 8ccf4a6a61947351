"""The suite: which cells there are, that it goes on, and that the page says what the files say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pyro_scenes import cards, checkpoint, cli, suite, tables
from pyro_scenes.config import make_config
from pyro_scenes.data import make
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import evaluate
from pyro_scenes.files import write_json
from pyro_scenes.suite import Cell
from pyro_scenes.training import train

TINY = ("location_width=8", "location_blocks=1", "appearance_width=4", "appearance_hidden=8",
        "sprite_hidden=8", "latent=2", "batch_size=4", "eval_images=4", "warmup_full=0",
        "warmup_end=0", "one_object=9", "one_object_end=9")  # fmt: skip
SETS = {"multi-dsprites", "multi-sprites"}  # the tests have no MNIST


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A folder with one tiny checkpoint of two seeds."""
    folder = tmp_path_factory.mktemp("shipped")
    runs = []
    for seed in (0, 1):
        config = make_config("lavae", "multi-dsprites", settings=TINY, steps=2, seed=seed)
        runs.append(folder / str(seed))
        train(config, runs[-1], device="cpu", progress=False)
    cards.ship("tiny", runs, folder=folder, images=6, particles=2, device="cpu")
    return folder


@pytest.fixture(autouse=True)
def home(shipped: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "SHIPPED", shipped)
    known = {name: spec for name, spec in suite.DATASETS.items() if name in SETS}
    monkeypatch.setattr(suite, "DATASETS", known)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str):
    return CliRunner().invoke(cli.evaluate, ["--suite", "--device", "cpu", "--images", "6",
                                             "--particles", "2", *arguments])


def test_a_checkpoint_is_measured_on_all_that_it_reads_and_that_fits() -> None:
    found = list(suite.cells(checkpoint.load("tiny"), "tiny", None))
    # Three channels: not the grey set. As many crowded kinds as the canvas has room for.
    assert {cell.data for cell in found} == {"multi-dsprites"}
    assert [cell.objects for cell in found] == [(0, 3), (5, 5), (7, 7), (9, 9), (12, 12)]


def test_crowds_end_where_they_no_longer_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(name: str, images: int, *, objects: Any = None, **options: Any) -> Any:
        if objects and objects[1] > 7:
            raise UserError("they do not fit")
        return make(name, images, objects=objects, **options)

    monkeypatch.setattr(suite, "make", small)
    found = list(suite.cells(checkpoint.load("tiny"), "tiny", None))
    assert [cell.objects for cell in found] == [(0, 3), (5, 5), (7, 7)]


def test_cells_hold_what_evaluate_says() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    cell = json.loads(Cell("tiny", "multi-dsprites", (0, 3)).file(Path("results")).read_text())
    model = checkpoint.load("tiny").model
    scenes = make("multi-dsprites", 6)
    again = evaluate(model, scenes, particles=2, limit=math.inf, progress=False)
    for key in ("nll", "nll_stderr", "count_accuracy", "ari", "split", "entropy"):
        assert cell[key] == again[key]
    crowded = json.loads(Cell("tiny", "multi-dsprites", (7, 7)).file(Path("results")).read_text())
    assert crowded["nll"] is None and crowded["count_accuracy"] is not None
    page = Path("RESULTS.md").read_text()
    assert f"{cell['nll']:.1f} +- {cell['nll_stderr']:.1f} (bernoulli)" in page
    assert f"| {crowded['count_accuracy']:.4f} |" in page and "43.9 +- 1.0" in page
    assert tables.spread(_figures(), "nll", 1) in suite.head(Path("results"))


def _figures() -> list[dict]:
    runs = json.loads((checkpoint.SHIPPED / "tiny.json").read_text())["runs"]
    return [entry["figures"]["0-3 objects"] for entry in runs]


def test_it_goes_on_where_it_stopped_and_measures_anew_what_changed() -> None:
    assert run().output.count("results/") == 5
    assert "results/" not in run("tiny").output  # all is there
    kept = Cell("tiny", "multi-dsprites", (5, 5)).file(Path("results"))
    kept.unlink()
    assert run().output.count("results/") == 1
    # Weights that were shipped anew.
    write_json(kept, json.loads(kept.read_text()) | {"weights": "others"})
    assert run().output.count("results/") == 1
    # More is asked for.
    again = CliRunner().invoke(cli.evaluate, ["--suite", "--images", "7", "--particles", "2"])
    assert again.output.count("results/") == 5


def test_the_page_shows_no_cell_of_other_weights_and_how_much_was_measured() -> None:
    run()
    assert "6 scenes of 0 to 3 objects, and as many of each" in Path("RESULTS.md").read_text()
    own = Cell("tiny", "multi-dsprites", (0, 3)).file(Path("results"))
    cell = json.loads(own.read_text())
    assert suite._number(cell, "ari", 3) in suite.page(Path("results"))
    assert f"| {tables.spread(_figures(), 'ari', 3)} |" in suite.head(Path("results"))
    write_json(own, cell | {"weights": "others", "ari": 0.1234})
    assert "0.123" not in suite.page(Path("results"))
    assert "## multi-dsprites" not in suite.page(Path("results"))
    amounts = suite._amounts((0, 3), {(6, 6, 2): ["one"], (9, 8, 2): ["two", "three"]},
                             crowds=False)
    assert "6 scenes" in amounts and "(one)" in amounts and "(two, three)" in amounts
    assert "crowded" not in amounts


@pytest.mark.parametrize("net,said", [
    ({"appearance_prior": "mixture:7"}, ", mixture:7"), ({"appearance_prior": "normal"}, ""),
    ({}, ""), ({"combine": "add", "attributes": 1}, ""),
    ({"combine": "deform", "attributes": 8}, ", 8 deformations"),
    ({"combine": "add", "contrast": True}, ", contrast"), ({"contrast": False}, ""),
    ({"combine": "deform", "attributes": 2, "contrast": True}, ", 2 deformations, contrast"),
])
def test_the_head_says_where_a_model_is_not_the_papers(net: dict, said: str) -> None:
    assert suite._departure({"net": net}) == said
    if said:
        path = checkpoint.SHIPPED / "tiny.json"
        before, content = (json.loads(path.read_text()) for _ in range(2))
        content["settings"]["net"] |= net
        try:
            write_json(path, content)
            assert f"tiny.md){said} |" in suite.head(Path("results"))
        finally:
            write_json(path, before)


def test_a_failure_is_kept_and_shown(monkeypatch) -> None:
    def fail(*arguments, **options) -> dict:
        raise UserError("an image shows too many objects")

    monkeypatch.setattr(suite, "evaluate", fail)
    assert run().exit_code == 0
    assert "an image shows too many objects" in Path("RESULTS.md").read_text()


@pytest.mark.parametrize("nll,count,likelihood,named", [
    ((40.0, 50.0), (1.0, 1.0), "bernoulli", ["nll"]),  # means are compared
    ((40.0, 47.0), (1.0, 1.0), "bernoulli", []),
    ((40.0, 40.0), (0.9989, 0.9990), "bernoulli", ["count"]),
    ((50.0, 50.0), (0.9, 1.0), "bernoulli", ["nll", "count"]),
    ((50.0, 50.0), (0.9, 1.0), "normal, sigma 0.3", ["count"]),  # densities do not compare
])
def test_cells_short_of_the_paper_are_named(nll, count, likelihood, named) -> None:
    """LAVAE's multi-dsprites has 43.9 nats and 0.999 of counts."""
    runs = [
        {"figures": {"0-3 objects": {"nll": n, "count_accuracy": c, "likelihood": likelihood}}}
        for n, c in zip(nll, count, strict=True)
    ]
    content = {"settings": {"data": "multi-dsprites", "model": "lavae"}, "runs": runs}
    (line,) = suite._short([content])
    assert all((f"the {name} of [lavae" in line) == (name in named) for name in suite.FIGURES)
    assert ("at least as good as its paper's" in line) == (not named)


def test_the_notes_have_the_sections_that_results_link_to() -> None:
    """By the anchors that GitHub makes of headings."""
    notes = (Path(__file__).parent.parent / "RUNS.md").read_text()
    anchors = {
        "".join(c for c in line[3:].lower().replace(" ", "-") if c.isalnum() or c == "-")
        for line in notes.splitlines() if line.startswith("## ")
    }
    for link in suite.TRIED.values():
        assert link.removeprefix("RUNS.md#") in anchors


def test_chunk_reaches_every_evaluation_of_a_likelihood(monkeypatch) -> None:
    asked = []

    def noted(*arguments, **options) -> dict:
        asked.append((options["particles"], options.get("chunk")))
        return evaluate(*arguments, **options)

    monkeypatch.setattr(suite, "evaluate", noted)
    assert run("--chunk", "3").exit_code == 0
    assert [chunk for particles, chunk in asked if particles] == [3]


@pytest.mark.parametrize("arguments,reason", [
    (("nothing",), "nothing is no shipped checkpoint"),
    (("tiny", "--data", "multi-dsprites"), "--suite chooses the data"),
    (("--seed", "1"), "--suite chooses the data, the seed"),
    (("--max-objects", "4"), "--suite chooses the data"),
    (("--readme", "absent.md"), "absent.md has no lines"),
])
def test_bad_input_is_one_line(arguments: tuple[str, ...], reason: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and reason in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("option", ["--suite", "--list"])
def test_one_of_several_processes_runs_no_suite_and_lists_nothing(option, monkeypatch) -> None:
    monkeypatch.setattr(suite, "run", lambda *given, **options: pytest.fail("it runs"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(cli.evaluate, [option])
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.splitlines()[-1] == "Error: --suite and --list are for one process"


def test_readme_goes_with_the_suite() -> None:
    result = CliRunner().invoke(cli.evaluate, ["tiny", "--data", "multi-dsprites", "--readme", "x"])
    assert result.exit_code == 2 and "--readme goes with --suite" in result.output


def test_one_image_has_a_bound_and_no_error() -> None:
    result = CliRunner().invoke(cli.evaluate, ["--suite", "tiny", "--images", "1",
                                               "--nll-images", "5", "--particles", "2"])
    assert result.exit_code == 0, result.output
    page = Path("RESULTS.md").read_text()
    assert "1 scenes of 0 to 3 objects" in page and "-log p(x) of 1 with 2" in page


def test_another_page_is_not_written_over(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("RESULTS.md").write_text("# Results\n\nOf something else.\n")
    result = CliRunner().invoke(cli.evaluate, ["--suite", "--images", "1"])
    assert result.exit_code == 2 and "not a page of svi-eval --suite" in result.output
    assert [path.name for path in Path().iterdir()] == ["RESULTS.md"]
