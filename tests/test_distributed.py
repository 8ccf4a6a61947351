"""Two processes over gloo: the gradients of one, disjoint parts, shared results, and BatchNorm."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from together import same_noise, start
from torch import Tensor, nn

from pyro_scenes import checkpoint, distributed, evaluate, training
from pyro_scenes.config import RunConfig, make_config
from pyro_scenes.data import load_npz
from pyro_scenes.errors import UserError
from pyro_scenes.objectives import OBJECTIVES, temporarily
from pyro_scenes.objectives.lavae import LAVAEObjective

BATCH, SIDE = 8, 16
TINY = {
    "lavae": (
        "latent=2", "sprite=5", "crop=7", "location_width=8", "location_blocks=1",
        "appearance_width=4", "appearance_hidden=6", "sprite_hidden=6", "max_objects=3",
        "sprite_width=6", "one_object=2", "one_object_end=6", "one_object_left=0",
        "warmup_full=2", "warmup_end=5", "location_settled=4", "probe=0.5",
    ),
    "discrete-air": (
        "classes=3", "attributes=2", "code=8", "decoder_hidden=8", "hidden=8", "window=8",
        "glimpse=8", "glimpse_width=4", "max_objects=2", "attributes_from=5", "balance=0.5",
    ),
    "air": (
        "latent=3", "decoder_hidden=8", "encoder_hidden=8", "hidden=8", "window=8", "glimpse=8",
        "glimpse_width=4", "max_objects=2",
    ),
    "conv-vae": ("grid_width=8", "grid_latent=2", "beta_full=0.5"),
}
# At the beginning, in the middle of the schedules, and where the location map rests, attributes
# have begun and nothing is forced: the first process then sees no object.
STEPS = (0, 3, 7)
# Between the new location maps' largest heights of blank images and of others.
THRESHOLDS = {"fast": "count_threshold=0.4", "paper": "count_threshold=1"}
ROWS = [(model, preset) for model in TINY for preset in ("fast", "paper")]


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float)


def images() -> Tensor:
    """(BATCH, 1, SIDE, SIDE): squares, more in later images, and none in the first half."""
    x = torch.zeros(BATCH, 1, SIDE, SIDE)
    for i in range(BATCH // 2, BATCH):
        for k in range(1 + i % 2):
            x[i, :, 2 + 7 * k : 6 + 7 * k, i - 2 : i + 2] = 1.0
    return x


def gradients(model_name: str, preset: str, data: str, step: int) -> dict[str, Any]:
    """Gradients, buffers and figures of one step, computed by as many processes as there are."""
    usable = [s for s in TINY[model_name] if _has(model_name, preset, data, s)]
    if model_name == "lavae":
        usable.append(THRESHOLDS[preset])
    config = make_config(model_name, data, preset, usable, STEPS[-1])
    torch.manual_seed(3)
    model = distributed.synced(checkpoint.build(config, (1, SIDE, SIDE)))
    objective = OBJECTIVES[model_name][0](config.schedule, model, STEPS[-1])
    distributed.synced(objective.modules)
    numbers = distributed.part(np.arange(BATCH))
    x = images()[numbers]
    model.train()
    sprites: list[int] = []
    if model_name == "lavae":
        model.sprite_net.register_forward_hook(lambda _, inputs, __: sprites.append(len(*inputs)))
    with same_noise(torch.from_numpy(numbers), step), temporarily(model, autocast=False):
        if distributed.world() == 1:
            figures = objective.backward(model, x, step)
        else:
            figures = distributed.backward(distributed.parallel(objective, model), x, step)
    both = {"model": model, "objective": objective.modules}
    return {
        "figures": figures,
        "sprites": sprites,
        "gradients": {
            f"{k} {n}": p.grad for k, m in both.items() for n, p in m.named_parameters()
        },
        "buffers": {f"{k} {n}": b for k, m in both.items() for n, b in m.named_buffers()},
    }


def _has(model_name: str, preset: str, data: str, setting: str) -> bool:
    try:
        make_config(model_name, data, preset, [setting])
    except UserError:
        return False
    return True


def location_targets(data: str) -> Tensor:
    """LAVAE's of maps that are the fainter the earlier they come, so that their scale matters."""
    config = make_config("lavae", data, settings=TINY["lavae"])
    torch.manual_seed(3)
    objective = LAVAEObjective(config.schedule, checkpoint.build(config, (1, SIDE, SIDE)), 10)
    maps = torch.arange(BATCH * 16.0).sin().square().reshape(BATCH, 4, 4)
    maps = maps * torch.logspace(-4, 0, BATCH)[:, None, None]
    return objective.location_target(maps[distributed.part(np.arange(BATCH))], (SIDE, SIDE))


def normalised(rows: Tensor) -> dict[str, Tensor]:
    """Values, gradients and statistics of rows that are normalised, then cubed and weighed."""
    network = nn.Sequential(nn.BatchNorm1d(3))
    distributed.synced(network)
    x = rows.clone().requires_grad_()
    y = network(x)
    (y**3 * torch.arange(3.0)).sum().backward()
    norm: Any = network[0]
    found = {"y": y.detach(), "x": x.grad, "mean": norm.running_mean, "var": norm.running_var}
    found["weight"] = distributed.total(norm.weight.grad)
    return found | {"later": network.eval()(rows).detach()}


ROWS_OF_ALL = torch.arange(15, dtype=torch.double).reshape(5, 3).sin()


def work(folder: Path) -> dict[Any, Any]:
    """What one of the processes does for all tests of this file."""
    torch.set_default_dtype(torch.double)
    rank = distributed.rank()
    found: dict[Any, Any] = {
        (model, preset, step): gradients(model, preset, str(folder / "x.npz"), step)
        for model, preset in ROWS for step in STEPS
    }
    found["targets"] = location_targets(str(folder / "x.npz"))
    found["normalised"] = normalised(ROWS_OF_ALL if rank else ROWS_OF_ALL[:0])
    found["part"] = distributed.part(np.arange(10))
    found["mapped"] = distributed.mapped(lambda item: (item, distributed.rank()), range(5))
    found["few"] = distributed.mapped(str, [7])
    found["shared"] = distributed.shared(lambda: f"of rank {distributed.rank()}")
    found["gathered"] = distributed.gathered(torch.tensor([rank, 10 * rank]))
    found["mean"] = distributed.mean({"a": 1.0 + rank, "b": 3.0})
    found["agreed"] = [distributed.agreed(w) for w in (False, rank == 1, True)]
    for key, wrong in (("all", 4), ("one", 1)):
        try:
            distributed.mapped(lambda item: fail(item, wrong), range(wrong + 1))
        except UserError as error:
            found[f"error of {key}"] = str(error)
    return found


def fail(item: int, wrong: int) -> int:
    if item == wrong:
        raise UserError(f"item {item} is wrong")
    return item


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("together")
    pixels = (images().permute(0, 2, 3, 1) * 255).byte().numpy()
    np.savez(path / "x.npz", images=pixels)
    return path


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    return start(work, folder)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("model, preset", ROWS)
def test_two_processes_have_the_gradient_of_one(both, folder, model, preset, step) -> None:
    alone = gradients(model, preset, str(folder / "x.npz"), step)
    assert sum(g is not None for g in alone["gradients"].values()) > 3
    for rank in both:
        together = rank[model, preset, step]
        for kind in ("gradients", "buffers"):
            assert together[kind].keys() == alone[kind].keys()
            for name, value in alone[kind].items():
                other = together[kind][name]
                assert (value is None) == (other is None), name
                if value is not None:
                    torch.testing.assert_close(
                        other, value, rtol=1e-6, atol=1e-7, msg=lambda m: f"{kind} {name}: {m}"
                    )
        assert together["figures"] == pytest.approx(alone["figures"], rel=1e-6)
    if (model, step) == ("lavae", STEPS[-1]):
        first, second = (rank[model, preset, step]["sprites"] for rank in both)
        assert first == [0] and second == alone["sprites"] != [0]


def test_location_targets_have_the_scale_of_the_whole_batch(both, folder) -> None:
    alone = location_targets(str(folder / "x.npz"))
    torch.testing.assert_close(torch.cat([rank["targets"] for rank in both]), alone)


def test_batch_normalisation_reads_all_rows_where_one_process_has_none(both) -> None:
    alone = normalised(ROWS_OF_ALL)
    for rank, rows in zip(both, (0, 5), strict=True):
        found = rank["normalised"]
        for name, value in alone.items():
            wanted = value[5 - rows:] if name in ("x", "y", "later") else value
            if len(found[name]):
                torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-12)
        assert len(found["x"]) == len(found["y"]) == rows


def test_parts_of_a_batch_are_disjoint_and_complete(both) -> None:
    parts = [rank["part"].tolist() for rank in both]
    assert parts == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert distributed.part(np.arange(3)).tolist() == [0, 1, 2]


def test_every_rank_gets_all_that_is_computed_in_turns(both) -> None:
    for rank in both:
        assert rank["mapped"] == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
        assert rank["few"] == ["7"]
        assert rank["shared"] == "of rank 0"
        assert rank["gathered"].tolist() == [0, 0, 1, 10]
        assert rank["mean"] == {"a": 1.5, "b": 3.0}
        assert rank["agreed"] == [False, True, True]


def test_bad_input_of_one_rank_is_told_to_all(both) -> None:
    for rank in both:
        assert rank["error of all"] == "item 4 is wrong"
        assert rank["error of one"] == "item 1 is wrong"


def test_all_of_a_run_of_several_processes_is_on_its_device(monkeypatch, tmp_path) -> None:
    """Where there is no other device, meta stands for one."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(checkpoint, "resolve", lambda name: torch.device("meta"))
    np.savez(tmp_path / "x.npz", images=np.zeros((24, 16, 16, 1), np.uint8))
    config = make_config("conv-vae", str(tmp_path / "x.npz"), preset="paper", settings=(
        "grid_width=8", "batch_size=4", "eval_images=2"))
    run = training.Run(config, "other")
    loss = distributed.Loss(run.objective, run.model)
    assert any(isinstance(m, distributed.SyncedBatchNorm) for m in run.model.modules())
    tensors = [*loss.parameters(), *loss.buffers()]
    assert len(tensors) > 10 and {tensor.device.type for tensor in tensors} == {"meta"}


def test_the_auxiliary_vae_of_a_run_reads_the_batches_of_all_processes(
    monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    np.savez(tmp_path / "x.npz", images=np.zeros((24, 16, 16, 1), np.uint8))
    config = make_config("lavae", str(tmp_path / "x.npz"), preset="paper", settings=(
        "sprite=5", "latent=2", "sprite_width=6", "batch_size=4", "eval_images=2"))
    kinds = {type(module) for module in training.Run(config, "cpu").objective.modules.modules()}
    assert distributed.SyncedBatchNorm in kinds and nn.BatchNorm2d not in kinds


def test_one_process_is_a_world_of_its_own() -> None:
    assert not distributed.launched()
    with distributed.session("cpu"):
        assert (distributed.world(), distributed.rank()) == (1, 0)
    figures = {"a": 1.0}
    assert distributed.mean(figures) is figures and distributed.agreed(True)
    network = nn.Sequential(nn.BatchNorm2d(2))
    distributed.synced(network)
    assert type(network[0]) is nn.BatchNorm2d


def test_seeds_differ_wherever_a_part_of_them_does() -> None:
    seeds = {distributed.seed(*parts) for parts in np.ndindex(4, 5, 6)}
    assert len(seeds) == 120 and all(0 <= s < 2**64 for s in seeds)


# --- trainings ------------------------------------------------------------------------------------


class Crash(Exception):
    """Stands for a machine that stops."""


HALF, WHOLE = 3, 6
SEEDS: list[int] = []  # of the noise of each step that this process has done


def configured(data: Path, *settings: str) -> RunConfig:
    return make_config("lavae", str(data), settings=(
        *TINY["lavae"], f"batch_size={BATCH // 2}", "log_every=1", "eval_every=2",
        "eval_images=2", f"checkpoint_every={HALF}", "precision=float32", *settings,
    ), steps=WHOLE)


def run(config: RunConfig, out: Path, until: int = WHOLE, **options: Any) -> training.History:
    """Train, or crash after some steps."""
    torch.set_default_dtype(torch.float)
    advance = training.Run.advance

    def limited(self: training.Run) -> dict[str, float]:
        if self.step == until:
            raise Crash
        figures = advance(self)
        SEEDS.append(torch.initial_seed())
        return figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "advance", limited)
        try:
            return training.train(config, out, device="cpu", progress=False, **options)
        except Crash:
            return {}


def train_together(folder: Path) -> dict[str, Any]:
    config = configured(folder / "x.npz")
    run(config, folder / "two then one", until=HALF)
    SEEDS.clear()
    history = run(config, folder / "whole")
    of_whole = list(SEEDS)
    run(config, folder / "parts", until=HALF)
    torch.manual_seed(distributed.rank())  # what a new process would have
    found: dict[str, Any] = {
        "whole": history,
        "seeds": of_whole,
        "parts": run(config, folder / "parts", resume=True),
        "one then two": run(config, folder / "one then two", resume=True),
    }
    for name, force in {"there": False, "odd": True}.items():
        changed = configured(folder / "x.npz", *(["batch_size=3"] if force else []))
        try:
            training.train(changed, folder / "whole", device="cpu", progress=False, force=force)
        except UserError as error:
            found[name] = str(error)
    model = checkpoint.load(folder / "whole").model
    data = load_npz(folder / "x.npz")
    settings: dict[str, Any] = {"particles": 30, "chunk": 60, "progress": False, "limit": 99}
    found["figures"] = evaluate.evaluate(model, data, **settings)
    found["look"] = evaluate.look(model, data)
    return found


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with runs, and what the two processes that made them found."""
    run(configured(folder / "x.npz"), folder / "one then two", until=HALF)
    return folder, start(train_together, folder)


def content(out: Path) -> dict[str, Any]:
    return checkpoint.read(out / checkpoint.FILE)


def test_a_resumed_run_of_two_processes_ends_as_one_that_was_not_interrupted(trained) -> None:
    folder, ranks = trained
    whole, parts = content(folder / "whole"), content(folder / "parts")
    assert whole["step"] == parts["step"] == WHOLE
    assert "2 processes" in whole["training"]["machine"]
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    assert all(r["whole"] == r["parts"] == ranks[0]["whole"] for r in ranks)
    assert (folder / "whole" / "history.json").read_bytes() == (
        folder / "parts" / "history.json").read_bytes()


def test_every_rank_and_step_has_noise_of_its_own(trained) -> None:
    _, ranks = trained
    assert len({seed for rank in ranks for seed in rank["seeds"]}) == 2 * WHOLE


def test_a_run_goes_on_with_another_number_of_processes(trained, tmp_path) -> None:
    folder, ranks = trained
    histories = []
    for copy in ("a", "b"):  # what follows is defined by what was kept
        shutil.copytree(folder / "two then one", tmp_path / copy)
        assert content(tmp_path / copy)["step"] == HALF
        histories.append(run(configured(folder / "x.npz"), tmp_path / copy, resume=True))
    fewer, more = histories[0], ranks[0]["one then two"]
    assert histories[0] == histories[1] and ranks[1]["one then two"] == more
    for history in (fewer, more):
        assert history["loss"][0] + history["surprise"][0] == list(range(1, WHOLE + 1))
        assert all(math.isfinite(value) for value in history["loss"][1])
    # Before the change each has the history of its kind: the streams of noise differ.
    assert fewer["loss"][1][:HALF] == ranks[0]["whole"]["loss"][1][:HALF]
    alone = run(configured(folder / "x.npz"), tmp_path / "alone")
    assert more["loss"][1][:HALF] == alone["loss"][1][:HALF]
    assert more["loss"][1][HALF:] != alone["loss"][1][HALF:]


def test_two_processes_refuse_what_one_does_and_parts_of_unlike_size(trained) -> None:
    _, ranks = trained
    for found in ranks:
        assert "holds a run already" in found["there"]
        assert found["odd"] == "batch_size 3 does not divide into parts for 2 processes"


def test_two_processes_measure_what_one_does_with_the_same_seeds(trained) -> None:
    folder, ranks = trained
    torch.set_default_dtype(torch.float)
    model, data = checkpoint.load(folder / "whole").model, load_npz(folder / "x.npz")
    settings: dict[str, Any] = {"particles": 30, "chunk": 60, "progress": False, "limit": 99}
    alone = evaluate.evaluate(model, data, chunk_seeds=True, **settings)
    once = evaluate.evaluate(model, data, **settings)
    for found in (alone, once, *(rank["figures"] for rank in ranks)):
        found.pop("seconds")
    assert ranks[0]["figures"] == ranks[1]["figures"] == alone
    # The samples differ, and no more than they may.
    assert once["nll"] != alone["nll"]
    assert once["nll"] == pytest.approx(alone["nll"], rel=0.05)
    assert ranks[0]["look"] == ranks[1]["look"]
