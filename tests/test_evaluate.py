"""What an evaluation reports, of a model that finds just the dots of ink in an image."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_bounds import Fixed, Prior
from torch import Tensor, nn

from pyro_scenes import bounds, evaluate, metrics, report
from pyro_scenes.data import SceneData
from pyro_scenes.errors import UserError
from pyro_scenes.models.conv_vae import ConvVAE, ConvVAEConfig
from pyro_scenes.models.lavae import LAVAE, LAVAEConfig

CONFIG = LAVAEConfig(
    max_objects=2, latent=1, sprite=3, crop=3, location_width=8, location_blocks=1,
    appearance_width=4, appearance_hidden=6, sprite_hidden=(6,), count_window=3, blocked_window=1,
    count_threshold=2.0, logit_scale=0.5, likelihood_floor=0.2,
)


class Bright(nn.Module):
    """A location network that finds one object at every pixel of ink."""

    stride = 1

    def forward(self, x: Tensor) -> Tensor:
        return 2.5 * x.amax(1)


def dots() -> tuple[LAVAE, SceneData]:
    """Images with 0, 1, 2 and 2 dots of ink, and a model that finds just those."""
    model = LAVAE(CONFIG, (1, 4, 4)).eval()
    model.location_net = Bright()
    sprite = torch.zeros(1, 1, 3, 3)
    sprite[..., 1, 1] = 0.95
    model.sprite_net, model.appearance_net = Fixed(sprite), Prior()
    pixels = np.zeros((4, 4, 4, 1), np.uint8)
    pixels[1, 0, 0] = 255
    pixels[2, 1, 1], pixels[2, 3, 3] = 255, 255
    pixels[3, 0, 3], pixels[3, 3, 0] = 255, 255
    data = SceneData.from_images(
        "dots", pixels, counts=np.array([0, 1, 2, 1]), segmentation=(pixels[..., 0] > 0) * 1
    )
    # By the truth the two dots of the third image are two objects, those of the fourth one.
    data.segmentation[2, 3, 3] = 2
    return model, data


def test_an_evaluation_reports_what_it_should() -> None:
    model, data = dots()
    result = evaluate.evaluate(model, data, particles=5, seed=3, progress=False)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {k: result[k] for k in ("model", "data", "images", "particles", "seed")} == {
        "model": "lavae", "data": "dots", "images": 4, "particles": 5, "seed": 3}
    assert result["count_accuracy"] == 0.75
    assert result["count_confusion"] == metrics.count_confusion(
        np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1]))
    assert result["category_correspondence"] is None and result["seconds"] >= 0
    # One pixel; two pixels apart that are apart; two that should be one segment and are two:
    # there the index is 0. The image without objects has none.
    assert result["ari"] == pytest.approx((1 + 1 + 0) / 3)

    torch.manual_seed(3)
    nll = -bounds.iwae(model, data.batch(), 5).double()
    assert result["nll"] == pytest.approx(nll.mean().item())
    assert result["nll_stderr"] == pytest.approx(nll.std().item() / 2)

    torch.manual_seed(3)
    weights = bounds.log_weights(model, data.batch(), 5).double()
    assert result["curve"] == [
        {"particles": 1, "nll": pytest.approx(-weights.mean().item()),
         "nll_stderr": pytest.approx(weights.mean(0).std().item() / 2)},
        {"particles": 5, "nll": result["nll"], "nll_stderr": result["nll_stderr"]},
    ]
    effective = weights.exp().sum(0) ** 2 / weights.exp().square().sum(0)  # (4,)
    assert result["ess"] == {
        "mean": pytest.approx(effective.mean().item(), rel=1e-5),
        "median": pytest.approx(np.median(effective.numpy()), rel=1e-5),
        "decile": pytest.approx(np.quantile(effective.numpy(), 0.1), rel=1e-5),
    }
    assert list(result["split"]) == ["reconstruction", "n", "z_loc", "z_app"]
    assert sum(result["split"].values()) == pytest.approx(result["curve"][0]["nll"])


def test_an_evaluation_of_categories_and_their_places() -> None:
    model, data = dots()
    # By the model, dots left of the middle are 4 and others 9.
    infer = model.infer

    def categorise(x: Tensor, limit: float | None = None):
        scene = infer(x, limit)
        kind = torch.where(scene.where[..., 0] < 2, 4, 9)
        return replace(scene, kind=kind.masked_fill(~scene.present, -1))

    model.infer = categorise
    # By the truth it is so in the second and third image, and the other way round in the fourth.
    none = (np.nan,) * 4
    truth: dict[str, Any] = {
        "categories": np.array([[-1, -1], [0, -1], [0, 1], [0, 1]]),
        "boxes": np.array([
            [none, none], [(0.5, 0.5, 1, 1), none],
            [(1.5, 1.5, 1, 1), (3.5, 3.5, 1, 1)], [(3.5, 0.5, 1, 1), (0.5, 3.5, 1, 1)],
        ], np.float32),
    }
    result = evaluate.evaluate(model, replace(data, **truth), particles=0)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["category_correspondence"] == 1 and result["classes"] == 2
    assert result["placed_correspondence"] == result["purity"] == pytest.approx(3 / 5)

    header, row = report.table({"dots": result}).splitlines()
    at = [header.index(name) for name in ("categories right", "classes", "right in place", "pur")]
    assert [row[i:].split()[0] for i in at] == ["100.00%", "2", "60.00%", "60.00%"]

    # Without boxes the paper's figure is left, without labels the classes.
    result = evaluate.evaluate(model, replace(data, **truth | {"boxes": None}), particles=0)
    assert result["category_correspondence"] == 1 and result["classes"] == 2
    assert result["placed_correspondence"] is None and result["purity"] is None
    result = evaluate.evaluate(model, data, particles=0)
    assert result["category_correspondence"] is None and result["classes"] == 2
    assert "%" not in report.table({"dots": result}).split("75.00%")[1]


def test_an_evaluation_follows_its_seed_and_its_images() -> None:
    model, data = dots()
    one, same, other = (
        evaluate.evaluate(model, data[:3], particles=3, seed=seed, progress=False)["nll"]
        for seed in (0, 0, 1)
    )
    assert one == same != other
    short = evaluate.evaluate(model, data[:3], particles=3, progress=False)
    assert short["images"] == 3 and short["nll"] == one


def test_what_cannot_be_measured_is_none() -> None:
    model, data = dots()
    bare = SceneData.from_images("bare", data.images())
    result = evaluate.evaluate(model, bare[:1], particles=2, progress=False)
    assert {k for k, value in result.items() if value is None} == {
        "nll_stderr", "count_accuracy", "count_confusion", "category_correspondence",
        "placed_correspondence", "purity", "classes", "ari", "entropy"}
    grey = SceneData.from_images("grey", data.images() // 2)
    result = evaluate.evaluate(model, grey, particles=2, progress=False)
    assert report.table({"grey": result}).splitlines()[-1] == (
        "no -log p(x): the images are grey, and a bernoulli likelihood is of binary ones;"
        " models of the package have one of them if trained with --set likelihood=normal")
    assert [result[key] for key in ("nll", "curve", "ess", "split")] == [None] * 4
    # A model without objects has a likelihood, and no count.
    vae = ConvVAE(ConvVAEConfig(1, 2, 8), (1, 4, 4)).eval()
    result = evaluate.evaluate(vae, data, particles=2, progress=False)
    assert result["nll"] > 0 and result["count_accuracy"] is None and result["ari"] is None


def test_inference_of_a_data_set_is_that_of_its_batches(monkeypatch) -> None:
    model, data = dots()
    whole, map_of_all = evaluate.infer(model, data, segment=True)
    monkeypatch.setattr(evaluate, "BATCH", 1)
    parts, map_in_parts = evaluate.infer(model, data, segment=True)
    unsegmented, nothing = evaluate.infer(model, data)
    assert nothing is None and unsegmented.to_json() == parts.to_json()
    assert whole.to_json() == parts.to_json() and torch.equal(map_of_all, map_in_parts)
    assert whole.counts.tolist() == [0, 1, 2, 2]
    assert map_of_all[0].eq(0).all() and map_of_all.amax((1, 2)).tolist() == [0, 1, 2, 2]


def test_a_look_is_the_one_sample_bound_and_the_count_accuracy() -> None:
    model, data = dots()
    look = evaluate.look(model, data)
    assert look["count accuracy"] == 0.75
    torch.manual_seed(0)
    bound = bounds.iwae(model, data.batch(), 1).mean().item()
    assert look["held-out -ELBO"] == pytest.approx(-bound)
    assert evaluate.look(model, data) == look


def test_no_images_are_refused() -> None:
    model, data = dots()
    empty: dict[str, Any]
    for empty in ({"data": data[:0]}, {"data": data, "nll_images": 0}):
        with pytest.raises(UserError, match="no images"):
            evaluate.evaluate(model, **empty)
    with pytest.raises(UserError, match="no images"):
        evaluate.infer(model, data[:0])
    with pytest.raises(UserError, match="no images"):
        bounds.measure(model, data[:0], 2)


def test_an_evaluation_in_the_midst_of_a_training_moves_nothing() -> None:
    """Norms of batches, which a model in training mode would move."""
    model = ConvVAE(ConvVAEConfig(8, 2, 8, "paper"), (3, 16, 16)).train()
    model.encoder[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert any("running" in name for name in before)
    data = SceneData.from_images("noise", np.uint8(255) * np.eye(16, dtype=np.uint8).repeat(
        3, 0).reshape(1, 16, 16, 3))
    found = evaluate.evaluate(model, data, particles=2, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model.encoder[0].training and model.encoder[1].training
    assert found["nll"] == evaluate.evaluate(model.eval(), data, particles=2, progress=False)["nll"]


def test_larger_images_come_in_smaller_batches() -> None:
    def sizes(height: int, width: int) -> list[int]:
        images = np.broadcast_to(np.uint8(0), (300, height, width, 1))
        data = SceneData("black", (height, width, 1), images)
        return [part.stop - part.start for part in evaluate.batches(data)]

    assert sizes(64, 64) == sizes(8, 8) == [256, 256]  # the last stops beyond the end
    assert sizes(128, 64) == [128] * 3
    assert sizes(1024, 2048) == [1] * 300
