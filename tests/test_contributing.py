"""The recipes of CONTRIBUTING.md, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pytest
import test_models
import torch
from click.testing import CliRunner
from scipy import stats

from pyro_scenes import checkpoint, cli, priors
from pyro_scenes.config import make_config
from pyro_scenes.data import DATASETS, make, save_npz
from pyro_scenes.evaluate import evaluate
from pyro_scenes.extensions import VARIABLE
from pyro_scenes.models import MODELS
from pyro_scenes.training import train

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL))


def written(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that a block is."""
    module = ModuleType(path.removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(BLOCKS[path], f"<{path}>", "exec"), vars(module))
    return module


def row(name: str, after: str, known: dict[str, Any]) -> Any:
    """The value of a registry's row in the page, the first of that name after a text."""
    found = re.search(rf'`("{name}": .*?),`', PAGE[PAGE.index(after):], flags=re.DOTALL)
    assert found
    return eval("{" + found[1] + "}", known)[name]


def test_every_file_of_the_page_is_there_but_for_the_new_ones() -> None:
    files = {path for path in re.findall(r"`(\w+/[\w/]+\.\w+)`", PAGE) if "NAME" not in path}
    assert "pyro_scenes/priors.py" in files
    missing = {path for path in files if not (Path(__file__).parents[1] / path).is_file()}
    assert not missing


def test_the_python_of_the_readme_does_what_it_says() -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    found: dict[str, Any] = {}
    fresh = checkpoint.load("lavae-multi-dsprites").model.state_dict()
    with pyro.get_param_store().scope():
        for _ in range(2):  # a cell may be run again
            exec(compile(code, "<README.md>", "exec"), found)
            moved = found["model"].named_parameters()
            assert not any(torch.equal(value, fresh[name]) for name, value in moved)
    assert found["drawn"].shape == (8, 3, 64, 64) and len(found["scenes"]) == 8
    assert found["bound"].shape == (8,) and found["bound"].isfinite().all()
    assert found["crowded"].shape == (8, 3, 64, 64) and set(found["counts"].tolist()) <= {4, 5}
    assert found["loss"] > 0


def test_a_model_and_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plus = written("pyro_scenes/data/multi_plus.py", monkeypatch)
    monkeypatch.setitem(DATASETS, "multi-plus", plus.SPEC)
    scenes = make("multi-plus", 40)
    ink = {"square": 49, "plus": 33}
    for image, kinds in zip(scenes.images(), scenes.categories):
        assert (image > 0).sum() == sum(ink[scenes.class_names[kind]] for kind in kinds[kinds >= 0])
    assert np.array_equal((scenes.categories >= 0).sum(1), scenes.counts)

    linear = written("pyro_scenes/models/linear.py", monkeypatch)
    monkeypatch.setitem(MODELS, "linear", row("linear", "`MODELS`", {"linear": linear}))
    known = {"Row": test_models.Row, "SHAPE": test_models.SHAPE, **vars(linear)}
    contract = row("linear", "`TABLE`", known)
    with torch.random.fork_rng():
        for check in (
            test_models.test_guide_and_model_have_the_same_latent_sites,
            test_models.test_every_site_has_a_log_prob_per_image,
            test_models.test_a_step_moves_every_parameter,
            test_models.test_two_instances_train_independently,
            test_models.test_samples_and_reconstructions_are_images,
            test_models.test_images_of_other_channels_are_refused,
        ):
            check(contract)
    save_npz(tmp_path / "plus.npz", scenes)
    settings = ("batch_size=10", "ramp=0", "eval_images=2")
    config = make_config("linear", str(tmp_path / "plus.npz"), settings=settings, steps=20)
    loss = train(config, tmp_path / "run", device="cpu", progress=False)["loss"][1]
    assert loss[-1] < loss[0]
    model = checkpoint.load(tmp_path / "run").model
    assert evaluate(model, scenes, particles=2, progress=False)["nll"] < loss[0]


def test_a_model_in_a_file_of_ones_own(tmp_path: Path) -> None:
    (line,) = re.findall(r'`(MODELS\["linear"\] = [^`]*)`', PAGE)
    code = f"{BLOCKS['pyro_scenes/models/linear.py']}\n" \
        f"from pyro_scenes.models import MODELS\n{line}\n"
    (tmp_path / "linear.py").write_text(code)
    save_npz(tmp_path / "mine.npz", make("multi-dsprites", 20))
    commands = Path(__file__).parents[1] / "bin"

    def ran(name: str, *args: str, file: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(commands / name), *args], cwd=tmp_path, capture_output=True,
            text=True, env=os.environ | {VARIABLE: file},
        )

    training = ran("svi-train", "--model", "linear", "--data", "mine.npz", "--steps", "2", "--out",
                   "run", "--set", "batch_size=4", file="linear.py")
    assert training.returncode == 0, training.stderr
    measured = ran("svi-eval", "run", "--data", "mine.npz", file="linear.py")
    assert measured.returncode == 0 and "-log p(x) <=" in measured.stdout
    without = ran("svi-eval", "run", "--data", "mine.npz", file="")
    assert without.returncode == 2 and "no model is called 'linear'" in without.stderr
    assert f"those of the files that {VARIABLE} names" in without.stderr
    swept = ran("svi-sweep", "--model", "linear", "--data", "mine.npz", "--steps", "2", "--seeds",
                "0", "--set", "batch_size=4", "--out", "swept", file="linear.py")
    assert swept.returncode == 0, swept.stdout + swept.stderr


@pytest.mark.parametrize(
    "name, code, said",
    [
        ("nowhere.py", None, "nowhere.py, which is no file of Python"),
        ("mine.txt", "", "mine.txt, which is no file of Python"),
        ("json.py", "", "another module is called json"),
        ("tabnanny.py", "", "another module is called tabnanny"),  # that nothing has imported
        ("ends.py", "import sys\nsys.exit()\n", "ends.py, line 2: SystemExit"),
        ("broken.py", "x = 1\nx.y\n", "broken.py, line 2: AttributeError: 'int' object has"),
        ("unread.py", "x =\n", "unread.py: SyntaxError: invalid syntax"),
    ],
)
def test_a_file_that_cannot_be_run_is_told(
    name: str, code: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code is not None:
        (tmp_path / name).write_text(code)
    monkeypatch.setenv(VARIABLE, str(tmp_path / name))
    result = CliRunner().invoke(cli.evaluate, ["--list"])
    assert result.exit_code == 2 and said in result.output
    assert result.output.count("\n") == 1 and "broken" not in sys.modules


def test_a_file_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, told = tmp_path / "runs_once.py", tmp_path / "told"
    file.write_text(f"with open({str(told)!r}, 'a') as told:\n    told.write('ran ')\n")
    # That others could import it, and that a folder has its name, makes it no other module.
    (tmp_path / "linked").symlink_to(tmp_path)
    (tmp_path / "folders" / "runs_once").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "linked")
    monkeypatch.syspath_prepend(tmp_path / "folders")
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(file), str(tmp_path / "linked" / file.name)]))
    for _ in range(2):
        assert CliRunner().invoke(cli.evaluate, ["--list"]).exit_code == 0
    assert told.read_text() == "ran "
    monkeypatch.delitem(sys.modules, "runs_once")


def test_a_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(vars(priors))
    exec(BLOCKS["pyro_scenes/priors.py"], known)
    kind = row("poisson", "`PRIORS`", known)
    monkeypatch.setitem(priors.PRIORS["count"], "poisson", kind)
    count = priors.make("count", kind.example, 4)()
    masses = count.log_prob(torch.arange(5)).exp()
    expected = stats.poisson(1.5).pmf(np.arange(5))
    assert np.allclose(masses, expected / expected.sum(), atol=1e-6)
    for wrong in ("poisson", "poisson:0", "poisson:inf"):
        with pytest.raises(priors.UserError):
            priors.make("count", wrong, 4)
