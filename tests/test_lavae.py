"""LAVAE: its draws, densities, scenes and rendering against hand-worked values and by-hand sums."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor, nn

from pyro_scenes import nets
from pyro_scenes.bounds import log_weights
from pyro_scenes.distributions import one_hot
from pyro_scenes.errors import UserError
from pyro_scenes.likelihoods import NormalImage
from pyro_scenes.models.lavae import LAVAE, Encoded, LAVAEConfig
from pyro_scenes.scene import Scene
from pyro_scenes.spatial import crops, place_sprites

CONFIG = LAVAEConfig(
    max_objects=3, latent=2, sprite=5, crop=7, location_width=8, location_blocks=1,
    appearance_width=4, appearance_hidden=6, sprite_hidden=(5,), count_threshold=2.0,
    count_window=3, blocked_window=3, logit_scale=0.5, likelihood_floor=0.01,
)
PAPER = replace(CONFIG, networks="paper", sprite_width=6, straight_through=False)
SHAPE = (3, 8, 12)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Seen(nn.Module):
    """A location network that returns given heights."""

    stride = 1

    def __init__(self, heights: Tensor):
        super().__init__()
        self.heights = heights  # (B, H, W)

    def forward(self, x: Tensor) -> Tensor:
        return self.heights[:len(x)]


def peaks(places: list[list[tuple[int, int, float]]], size=SHAPE[1:]) -> Seen:
    """Heights that are 0 but for (row, column, height), for each image."""
    heights = torch.zeros(len(places), *size)
    for b, row in enumerate(places):
        for r, c, height in row:
            heights[b, r, c] = height
    return Seen(heights)


def lavae(config: LAVAEConfig = CONFIG, shape=SHAPE) -> LAVAE:
    model = LAVAE(config, shape).eval()
    for parameter in model.sprite_net.parameters():
        parameter.data.mul_(2)  # sprites that differ
    return model


def images(batch: int, shape=SHAPE) -> Tensor:
    return (torch.rand(batch, *shape) < 0.3).float()


def traces(model: LAVAE, x: Tensor, counts: list[int], heights: Tensor | None = None):
    """The guide's and the model's trace of a draw with given counts."""
    heights = torch.zeros(len(x), *x.shape[-2:]) if heights is None else heights
    guide = poutine.trace(model.guide).get_trace(x, Encoded(heights, torch.tensor(counts)))
    joint = poutine.trace(poutine.replay(model.model, trace=guide)).get_trace(x)
    guide.compute_log_prob()
    joint.compute_log_prob()
    return guide, joint


def place_of(trace: poutine.Trace, slot: int) -> Tensor:
    return trace.nodes[f"z_loc_{slot}"]["value"].argmax(-1)


# --- the densities -------------------------------------------------------------------------------


def test_the_joint_by_hand() -> None:
    """Each factor of equation 1, and the image of equation 4, for one image with two objects."""
    model, x = lavae(), images(1)
    model.count_prior.logits.data = torch.tensor([0.1, 0.2, 0.7, -1.0])
    _, joint = traces(model, x, [2])
    sites = {name: site["log_prob"].item() for name, site in joint.nodes.items()
             if name in ("n", "x") or name.startswith("z_")}
    logits = [0.1, 0.2, 0.7, -1.0]
    assert sites["n"] == pytest.approx(0.7 - math.log(sum(map(math.exp, logits))), rel=1e-5)
    assert sites["z_loc_0"] == pytest.approx(-math.log(96), rel=1e-5)
    assert sites["z_loc_1"] == pytest.approx(-math.log(95), rel=1e-5)
    canvas = np.zeros((3, 8 + 4, 12 + 4))
    for slot in range(2):
        z = joint.nodes[f"z_app_{slot}"]["value"]
        normal = -0.5 * (z.square().sum().item() + 2 * math.log(2 * math.pi))
        assert sites[f"z_app_{slot}"] == pytest.approx(normal, rel=1e-5)
        row, column = divmod(place_of(joint, slot).item(), 12)
        canvas[:, row:row + 5, column:column + 5] += model.sprite_net(z).detach().numpy()[0]
    mean = 0.01 + 0.98 * canvas[:, 2:-2, 2:-2].clip(0, 1)
    pixels = x[0].numpy()
    density = pixels * np.log(mean) + (1 - pixels) * np.log(1 - mean)
    assert sites["x"] == pytest.approx(density.sum(), rel=1e-5)


def test_the_appearance_density_by_hand() -> None:
    """N(mean, exp(log variance)) of the crop round the place, its variance kept in bounds."""
    model, x = lavae(), images(6)
    with torch.no_grad():
        model.appearance_net.head[-1].bias[2:] = torch.tensor([1.0, 80.0])
    guide, _ = traces(model, x, [1] * 6)
    net, padded = model.appearance_net, np.pad(x.numpy(), [(0, 0), (0, 0), (3, 3), (3, 3)])
    for b, place in enumerate(place_of(guide, 0).tolist()):
        row, column = divmod(place, 12)
        crop = torch.from_numpy(padded[b:b + 1, :, row:row + 7, column:column + 7].copy())
        mean, log_variance = net.head(net.convolutions(crop))[0].double().tensor_split(2)
        variance = torch.stack([log_variance[0].exp(), torch.tensor(math.exp(4.0))])
        z = guide.nodes["z_app_0"]["value"][b].double()
        expected = -0.5 * ((z - mean) ** 2 / variance + (2 * math.pi * variance).log()).sum()
        found = guide.nodes["z_app_0"]["log_prob"][b]
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("shape, scale", [((1, 8, 12), 0.5), ((1, 4, 4), 0.5), ((1, 4, 4), 1.5)])
def test_the_logits_are_scaled_by_the_size_of_the_canvas(shape, scale) -> None:
    model, x = lavae(replace(CONFIG, logit_scale=scale), shape), images(2, shape)
    heights = torch.rand(2, *shape[1:])
    guide, _ = traces(model, x, [1, 1], heights)
    logits = scale * math.log(shape[1] * shape[2]) * heights.flatten(1).double().numpy()
    masses = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    drawn = masses[range(2), place_of(guide, 0)]
    assert np.allclose(guide.nodes["z_loc_0"]["log_prob"].exp(), drawn, rtol=1e-5)


def test_the_guide_shuts_a_window_round_each_place() -> None:
    """The second draw's mass is the softmax over what is left, and no draw is in the window."""
    model, x = lavae(), images(300)
    heights = torch.rand(300, 8, 12)
    guide, _ = traces(model, x, [2] * 300, heights)
    first, second = place_of(guide, 0), place_of(guide, 1)
    weights = np.exp(0.5 * math.log(96) * heights.flatten(1).double().numpy())
    rows, columns = np.divmod(np.arange(96), 12)
    for b in range(300):
        near = (abs(rows - first[b].item() // 12) <= 1) & (abs(columns - first[b].item() % 12) <= 1)
        assert not near[second[b]]
        expected = weights[b, second[b]] / weights[b, ~near].sum()
        found = guide.nodes["z_loc_1"]["log_prob"][b].exp().item()
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_window_as_large_as_the_canvas_leaves_all_but_the_place() -> None:
    model, x = lavae(replace(CONFIG, blocked_window=25)), images(200)
    guide, _ = traces(model, x, [3] * 200)
    drawn = torch.stack([place_of(guide, slot) for slot in range(3)], -1)
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    masses = guide.nodes["z_loc_2"]["log_prob"].exp()
    assert masses.tolist() == pytest.approx([1 / 94] * 200, rel=1e-2)


def test_relaxed_places_do_not_count_as_used_elsewhere() -> None:
    """A relaxed place has some mass everywhere; what it shuts is the place that it stands for."""
    model = lavae(replace(CONFIG, straight_through=False, blocked_window=1))
    model.temperature = 1.0
    _, joint = traces(model, images(20), [3] * 20)
    z = joint.nodes["z_loc_1"]["value"]
    assert z.amax(-1).max() < 1
    for slot, left in enumerate((96, 95, 94)):
        found = joint.nodes[f"z_loc_{slot}"]["log_prob"]
        assert found.tolist() == pytest.approx([-math.log(left)] * 20, rel=1e-4)


@pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["fast", "paper"])
def test_absent_objects_change_nothing(config) -> None:
    """An image's density is the same beside an image with more objects, which opens more slots."""
    model, x = lavae(config), images(3)
    guide, joint = traces(model, x, [1, 0, 3])
    values = {name: site["value"] for name, site in guide.nodes.items() if name[:2] == "z_"}
    assert len(values) == 6
    for b, count in enumerate((1, 0, 3)):
        kept = {"n": torch.tensor([count])} | {
            name: value[b:b + 1] for name, value in values.items() if int(name[-1]) < count}
        encoded = Encoded(torch.zeros(1, 8, 12), torch.tensor([count]))
        for function, arguments, whole in (
            (model.guide, (x[b:b + 1], encoded), guide), (model.model, (x[b:b + 1],), joint)
        ):
            alone = poutine.trace(poutine.condition(function, data=kept)).get_trace(*arguments)
            alone.compute_log_prob()
            total = sum(site["log_prob"][b] for name, site in whole.nodes.items()
                        if name in ("n", "x") or name in values)
            mine = sum(site["log_prob"][0] for name, site in alone.nodes.items()
                       if name in ("n", "x") or name in values)
            assert mine.item() == pytest.approx(total.item(), rel=1e-5)
    for trace in (guide, joint):
        for name in values:
            absent = torch.tensor([1, 0, 3]) <= int(name[-1])
            assert (trace.nodes[name]["log_prob"][absent] == 0).all()


# --- counts --------------------------------------------------------------------------------------


FOUR = [[(1, 1, 3.0), (1, 8, 5.0), (6, 3, 4.0), (6, 10, 2.5)], [(2, 2, 3.0)]]


def test_the_guide_draws_at_most_max_objects() -> None:
    model, x = lavae(), images(2)
    model.location_net = peaks(FOUR)
    assert model.encode(x).count.tolist() == [4, 1]
    guide = poutine.trace(model.guide).get_trace(x)
    assert guide.nodes["n"]["value"].tolist() == [3, 1]
    assert "z_app_2" in guide.nodes and "z_app_3" not in guide.nodes
    weights = log_weights(model, x, 5)
    assert weights.isfinite().all()


def test_inference_refuses_more_than_its_limit() -> None:
    model, x = lavae(), images(2)
    model.location_net = peaks(FOUR)
    with pytest.raises(UserError, match="shows 4 objects, more than the limit of 3.*--max-objects"):
        model.infer(x)
    with pytest.raises(UserError, match="limit of 2"):
        model.infer(x, limit=2)
    assert model.infer(x, limit=4).counts.tolist() == [4, 1]
    assert model.infer(x, limit=math.inf).counts.tolist() == [4, 1]


def test_counts_are_peaks_above_the_threshold() -> None:
    model = lavae(replace(CONFIG, count_threshold=2.7, count_window=5))
    # The shoulder two pixels away is in the window of its peak; 2.5 is below the threshold.
    model.location_net = peaks([[(4, 4, 3.5), (4, 6, 3.0), (4, 7, 3.0), (0, 11, 2.5)]])
    assert model.encode(images(1)).count.tolist() == [2]


def test_a_count_with_a_gradient_has_the_same_density() -> None:
    """Whatever a training makes of the count's gradient, it counts and weighs the same."""
    model, x = lavae(), images(3)
    model.location_net = peaks([FOUR[0][:2], [], FOUR[1]])
    totals, counts = [], []
    for temperature in (None, 1.0):
        model.temperature = temperature
        torch.manual_seed(1)
        encoded = model.encode(x)
        guide = poutine.trace(model.guide).get_trace(x, encoded)
        joint = poutine.trace(poutine.replay(model.model, trace=guide)).get_trace(x)
        counts.append(encoded.count.tolist())
        totals.append((guide.log_prob_sum().item(), joint.log_prob_sum().item()))
    assert counts == [[2, 0, 1]] * 2
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


# --- scenes --------------------------------------------------------------------------------------


def test_inferred_scenes_by_hand() -> None:
    model, x = lavae(), images(3)
    model.location_net = peaks(FOUR[:1] + [[]] + FOUR[1:])
    model.sprite_net = Marks([])  # black: its box is its window
    scene = model.infer(x, limit=4)
    assert scene.counts.tolist() == [4, 0, 1] and scene.size == (8, 12)
    assert scene.present.tolist() == [[True] * 4, [False] * 4, [True] + [False] * 3]
    # From the highest on; a place is the centre of its pixel.
    assert scene.where[0].tolist() == [[8.5, 1.5], [3.5, 6.5], [1.5, 1.5], [10.5, 6.5]]
    assert scene.where[2, 0].tolist() == [2.5, 2.5]
    assert scene.where[1].isnan().all() and scene.where[2, 1:].isnan().all()
    assert torch.equal(scene.boxes.isnan().all(-1), ~scene.present)
    assert scene.boxes[0, :2].tolist() == [[8.5, 1.5, 5, 5], [3.5, 6.5, 5, 5]]
    # The mean of q(z_app) is the network's, of the crop round the place.
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (3, 3), (3, 3)])
    net = model.appearance_net
    for b, slot, row, column in ((0, 0, 1, 8), (0, 3, 6, 10), (2, 0, 2, 2)):
        crop = torch.from_numpy(padded[b:b + 1, :, row:row + 7, column:column + 7].copy())
        mean = net.head(net.convolutions(crop))[0, :2]
        assert torch.allclose(scene.what[b, slot], mean, atol=1e-6)
    assert (scene.what[~scene.present] == 0).all()


@pytest.mark.parametrize("parallel", [False, True])
def test_samples_are_stacked_where_all_objects_have_sites(parallel) -> None:
    model = lavae()
    most = model.slots = model.config.max_objects
    prior = Predictive(poutine.uncondition(model.model), num_samples=9, parallel=parallel)
    samples = prior(images(1))
    assert samples["n"].flatten().unique().numel() > 1
    objects = {f"z_{kind}_{i}" for kind in ("loc", "app") for i in range(most)}
    assert samples.keys() == {"n", "x"} | objects
    assert samples["x"].squeeze(1).shape == (9, *images(1).shape[1:])


def test_an_object_moved_beyond_the_edge_is_cut_there() -> None:
    """What is drawn on a canvas with room all round, cut to the image."""
    model = lavae()
    what = torch.randn(1, 1, model.config.latent)
    height, width, room = 8, 12, 30
    with torch.no_grad():
        sprite = model.sprite_net(what[0]).numpy()[0]  # (3, 5, 5)
    for column in (-28, -3, -2, -1, 0, 5, 11, 12, 13, 14, 27):
        for row in (-25, -3, -2, 0, 3, 7, 8, 9, 10, 27):
            canvas = np.zeros((3, height + 2 * room, width + 2 * room))
            top, left = row - 2 + room, column - 2 + room
            canvas[:, top:top + 5, left:left + 5] = sprite
            where = torch.tensor([[[column + 0.5, row + 0.5]]])
            scene = Scene(torch.ones(1, 1, dtype=torch.bool), where, torch.zeros(1, 1, 4),
                          what=what, size=(height, width))
            with torch.no_grad():
                found = model.layers(scene)[0, 0].numpy()
            assert np.allclose(found, canvas[:, room:-room, room:-room], atol=1e-6), (row, column)


def test_rendering_is_the_sum_of_sprites() -> None:
    model, x = lavae(), images(2)
    model.location_net = peaks([[(0, 0, 5.0), (1, 2, 4.0), (7, 11, 3.0)], [(4, 6, 3.0)]])
    model.sprite_net.net[-1].bias.data.uniform_(-1, 2)  # some sum is beyond 1
    scene = model.infer(x)
    with torch.no_grad():
        decoded = [model.sprite_net(scene.what[b, :n]).numpy() for b, n in enumerate((3, 1))]
        rendered = model.render(scene)
    canvas = np.zeros((2, 3, 3, 8 + 4, 12 + 4))
    for b, places in enumerate(([(0, 0), (1, 2), (7, 11)], [(4, 6)])):
        for slot, (row, column) in enumerate(places):
            canvas[b, slot, :, row:row + 5, column:column + 5] = decoded[b][slot]
    canvas = canvas[..., 2:-2, 2:-2]
    assert canvas.sum(1).max() > 1.1
    assert np.allclose(rendered, canvas.sum(1).clip(0, 1), atol=1e-6)
    assert torch.equal(model.reconstruct(x), rendered)
    with torch.no_grad():
        assert np.allclose(model.layers(scene), canvas, atol=1e-6)
        sprites = model.sprites(scene)
    assert sprites.shape == (2, 3, 3, 5, 5)
    assert np.allclose(sprites[0], decoded[0]) and np.allclose(sprites[1, 0], decoded[1][0])
    assert (sprites[1, 1:] == 0).all()


class Marks(nn.Module):
    """A sprite decoder of black sprites with given pixels (row, column), z_app's value in all
    channels but the last."""

    def __init__(self, pixels: list[tuple[int, int]]):
        super().__init__()
        self.pixels = pixels

    def forward(self, z: Tensor) -> Tensor:
        sprites = torch.zeros(len(z), 3, 5, 5)
        for row, column in self.pixels:
            sprites[:, :2, row, column] = z[:, :1]
        return sprites


def marked(pixels, places: list[tuple[int, int]], values: list[float]) -> tuple[LAVAE, Scene]:
    """One scene with sprites of ``Marks`` at (row, column), and an absent slot after them."""
    model = lavae()
    model.sprite_net = Marks(pixels)
    slots = len(places) + 1
    where, what = torch.full((1, slots, 2), math.nan), torch.zeros(1, slots, 2)
    for slot, ((row, column), value) in enumerate(zip(places, values)):
        where[0, slot] = torch.tensor([column + 0.5, row + 0.5])
        what[0, slot, 0] = value
    present = torch.arange(slots)[None] < len(places)
    return model, Scene(present, where, torch.full((1, slots, 4), math.nan), what=what)


def test_boxes_are_those_of_the_ink() -> None:
    # Columns 1 to 2 and rows 0 to 3 of the sprite: its centre is half a pixel left and a whole
    # pixel up of the place's centre.
    model, scene = marked([(0, 1), (3, 2)], [(4, 6), (0, 0)], [0.9, 0.9])
    boxes = model.boxes(scene)
    assert boxes[0, 0].tolist() == [6.0, 4.0, 2.0, 4.0]
    assert boxes[0, 1].tolist() == [0.0, 0.0, 2.0, 4.0]  # not cut by the canvas
    assert boxes[0, 2].isnan().all()
    model, scene = marked([(2, 2)], [(4, 6)], [0.6])
    assert model.boxes(scene)[0, 0].tolist() == [6.5, 4.5, 1.0, 1.0]


def test_the_box_of_a_faint_sprite_is_its_window() -> None:
    model, scene = marked([(2, 2)], [(4, 6)], [0.4])
    assert model.boxes(scene)[0, 0].tolist() == [6.5, 4.5, 5.0, 5.0]


def test_a_dim_grey_sprite_has_a_box_and_a_segment() -> None:
    """Of pixels above 0.3, or half of its brightest if that is less."""
    for value, binary in ((0.9, False), (0.2, False), (0.4, True), (0.0, False)):
        model, scene = marked([(2, 2)], [(4, 6)], [value])
        if not binary:
            model.likelihood = NormalImage(0.3)
        side = 5.0 if binary or value == 0 else 1.0
        assert model.boxes(scene)[0, 0].tolist() == [6.5, 4.5, side, side]
        expected = torch.zeros(8, 12, dtype=torch.long)
        expected[4, 6] = side == 1.0
        assert torch.equal(model.segment(scene)[0], expected)
    drawn = torch.tensor(
        [[0.05, 0.11, 0.2], [0.29, 0.31, 0.9], [0.0, 0.0, 0.0], [0.14, 0.16, 0.31]]
    )[:, None]
    ink = [[False, True, True], [False, True, True], [False] * 3, [False, True, True]]
    assert model.ink(drawn, 0.3)[:, 0].tolist() == ink


def test_a_segmentation_by_hand() -> None:
    """A pixel goes to the object that adds most to it, if that is more than one half."""
    row = [(2, 1), (2, 2), (2, 3)]  # three pixels side by side
    model, scene = marked(row, [(1, 2), (1, 4), (5, 0)], [0.7, 0.9, 0.4])
    expected = torch.zeros(8, 12, dtype=torch.long)
    expected[1, 1:3] = 1
    expected[1, 3:6] = 2  # column 3 is in both
    assert torch.equal(model.segment(scene)[0], expected)
    expected[5, 0:2] = 3  # its first pixel is beyond the canvas
    assert torch.equal(model.segment(scene, threshold=0.3)[0], expected)


def test_scenes_without_objects() -> None:
    model, x = lavae(), images(2)
    model.location_net = peaks([[], []])
    scene = model.infer(x)
    assert scene.counts.tolist() == [0, 0] and scene.to_json() == [{"count": 0, "objects": []}] * 2
    assert torch.equal(model.render(scene), torch.zeros(2, *SHAPE))
    assert torch.equal(model.segment(scene), torch.zeros(2, 8, 12, dtype=torch.long))
    assert model.sprites(scene).shape == (2, 0, 3, 5, 5)


@pytest.mark.parametrize("config, shape", [(CONFIG, (3, 4, 20)), (PAPER, (3, 7, 5))],
                         ids=["fast", "paper"])
def test_other_sizes_than_the_trained_one(config, shape) -> None:
    model, x = lavae(config), images(2, shape)
    assert model.encode(x).heights.shape == (2, *shape[1:])
    model.location_net = peaks([[(3, 4, 5.0)], []], shape[1:])
    scene = model.infer(x)
    assert scene.where[0].tolist() == [[4.5, 3.5]] and scene.size == shape[1:]
    assert model.render(scene).shape == (2, *shape)
    assert log_weights(model, x, 3).isfinite().all()


# --- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["fast", "paper"])
def test_the_appearance_network_reads_each_image_at_each_place(config) -> None:
    """Many objects at once are what each is alone, in the order given, repeats included."""
    net, x = lavae(config).appearance_net, images(3)
    place, image = torch.tensor([95, 0, 13, 95, 0, 13]), torch.tensor([0, 2, 1, 0, 0, 1])
    together = torch.cat(net(x, one_hot(place, 96), image), -1)
    alone = [torch.cat(net(x[b:b + 1], one_hot(d[None], 96), torch.tensor([0])), -1)
             for d, b in zip(place, image)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-4
    assert (together[1] - together[4]).abs().max() > 1e-4  # the same place of another image


def test_peaks_have_no_ties_in_bfloat16() -> None:
    model, x = LAVAE(replace(CONFIG, location_width=32), (3, 32, 32)).eval(), images(4, (3, 32, 32))
    exact = model.encode(x).heights
    model.autocast = True
    rough = model.encode(x).heights
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert torch.allclose(rough, exact, atol=0.05 * exact.max().item())
    # bfloat16 has 256 values an octave, so 1024 such heights would be mostly ties.
    assert all(len(heights.unique()) > 900 for heights in rough.flatten(1))


@pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["fast", "paper"])
def test_what_is_drawn_in_bfloat16_is_float32(config) -> None:
    model, x = lavae(config), images(2)
    exact: list = []
    rough: list = []
    for values, model.autocast in ((exact, False), (rough, True)):
        torch.manual_seed(3)
        guide, joint = traces(model, x, [2, 1])
        values += [guide.nodes[name]["value"] for name in ("z_loc_0", "z_app_0", "z_app_1")]
        assert joint.nodes["x"]["log_prob"].dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in exact + rough)
    assert torch.allclose(exact[1], rough[1], atol=0.1) and not torch.equal(exact[1], rough[1])


@pytest.mark.parametrize("name", ["sprite", "crop", "count_window", "blocked_window"])
def test_even_sides_are_refused(name) -> None:
    even: dict[str, Any] = {name: 4}
    with pytest.raises(UserError, match=f"{name} must be odd"):
        LAVAE(replace(CONFIG, **even), SHAPE)


def test_paper_sprites_need_room_for_z_app() -> None:
    """f_sprite's residual blocks have sprite_width channels, of which z_app takes L."""
    few = LAVAEConfig(networks="paper", latent=48, sprite_width=48)
    with pytest.raises(UserError, match="sprite_width must be more than latent"):
        LAVAE(few, (1, 16, 16))
    LAVAE(replace(few, latent=47), (1, 16, 16))


def test_unsuitable_settings_and_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="networks must be"):
        LAVAE(replace(CONFIG, networks="slow"), SHAPE)
    with pytest.raises(UserError, match="multiples of 4"):
        LAVAE(CONFIG, (3, 8, 10))
    with pytest.raises(UserError, match="multiples of 4"):
        lavae().infer(images(1, (3, 10, 8)))


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_the_slopes_are_what_objects_are_worth(likelihood) -> None:
    """Against whole canvases drawn with and without each object; some hang over the edge."""
    model = lavae(replace(CONFIG, count_gain=40.0, likelihood=likelihood, sigma=0.3))
    model.reach = 2
    x = (torch.rand(2, *SHAPE) < 0.4).float()
    image, places = torch.tensor([0, 0, 1]), [(0, 1), (3, 4), (5, 11)]
    z_loc = torch.stack([one_hot(torch.tensor(r * 12 + c), 96) for r, c in places])
    z_loc.requires_grad_()
    n = torch.tensor([2.0, 1.0], requires_grad=True)
    sprites = torch.rand(3, 3, 5, 5)
    seen = crops(x, torch.tensor([1, 40, 71]), 5, image)
    sprites[0], sprites[1] = 0.05 + 0.9 * seen[0], 0.95 - 0.9 * seen[1]  # one fits, one does not
    sprites[2] = 0.3 - 0.3 * seen[2]
    canvas = place_sprites(sprites, z_loc, image, (2, *SHAPE[1:]))
    whole = model.likelihood(canvas).log_prob(x)
    worth = []
    for i, b in enumerate(image):
        others = [j for j in range(3) if j != i]
        rest = place_sprites(sprites[others], z_loc[others], image[others], (2, *SHAPE[1:]))
        worth.append((whole - model.likelihood(rest).log_prob(x))[b].item())
    assert worth[0] > 40 and worth[1] < -40 < worth[2] < math.log(96)  # all sides seen
    slopes = model._slopes(x, n, canvas, sprites, z_loc, image, torch.tensor([0, 1, 0]))
    assert slopes.tolist() == [0.0, 0.0]
    of_n, of_places = torch.autograd.grad(slopes.sum(), (n, z_loc))
    assert of_n.tolist() == pytest.approx([-40.0, worth[2]], rel=1e-4)
    for i, (r, c) in enumerate(places):
        lost = min(0.0, max(-40.0, min(40.0, worth[i])) - math.log(96))
        expected = torch.zeros(8, 12)
        expected[max(0, r - 2):r + 3, max(0, c - 2):c + 3] = lost
        torch.testing.assert_close(of_places[i].view(8, 12), expected, rtol=1e-4, atol=1e-4)


def test_there_are_no_slopes_but_in_a_training() -> None:
    model = lavae()
    z_loc = one_hot(torch.tensor([3]), 96)
    x, sprites, row = torch.zeros(1, *SHAPE), torch.rand(1, 3, 5, 5), torch.tensor([0])
    assert model._slopes(x, torch.tensor([1]), x, sprites, z_loc, row, row) is None


def test_a_probe_takes_the_next_lower_peak() -> None:
    """Where an ordinary draw would be lost in the background."""
    model = lavae(replace(CONFIG, logit_scale=1.0, count_threshold=0.5), shape=(3, 32, 32))
    heights = torch.full((400, 32, 32), 0.1)
    heights[:, 4, 5], heights[:, 20, 21] = 3.0, 0.45
    model.location_net = Seen(heights)
    x = torch.zeros(400, 3, 32, 32)
    probed = torch.arange(400) < 200
    encoded = model.encode(x, probed)
    assert encoded.count.tolist() == [2] * 200 + [1] * 200
    both = Encoded(heights, torch.full((400,), 2), probed)
    trace = poutine.trace(model.guide).get_trace(x, both)
    first, second = (place_of(trace, slot) for slot in (0, 1))
    assert (first == 4 * 32 + 5).float().mean() > 0.95
    hit = (second == 20 * 32 + 21).float()
    # The peak's odds are 1024 ** (0.35 * sharpness) to about 1,000.
    assert hit[:200].mean() > 0.95 and hit[200:].mean() < 0.1


def test_the_papers_sprites_train_on_a_single_object() -> None:
    """Whose batch has no spread: the running statistics normalise it, and stay as they are."""
    torch.manual_seed(0)
    net = nets.PaperSprite(4, 1, 9, 8)
    net(torch.randn(50, 4))  # moves the statistics from where they start
    z, before = torch.randn(1, 4), {k: v.clone() for k, v in net.linear.state_dict().items()}
    inner = net.linear[:2](z)
    expected = (inner - before["2.running_mean"]) / (before["2.running_var"] + 1e-5).sqrt()
    assert torch.allclose(net.linear(z), expected, atol=1e-5)
    assert net(z).isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in net.linear.state_dict().items())
