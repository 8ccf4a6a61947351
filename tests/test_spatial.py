"""Sprites, crops, windows and peaks against scipy, autograd, slicing and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from scipy.signal import convolve2d

from pyro_scenes.distributions import one_hot
from pyro_scenes.spatial import _fast, crops, find_peaks, ink_boxes, place_sprites, window_masks

# H, W, side of the sprite: H != W, odd sides, a sprite that is larger than the canvas.
CANVASES = [(6, 6, 3), (5, 8, 3), (9, 4, 5), (7, 7, 1), (3, 5, 7), (1, 6, 3)]


def objects(height: int, width: int, side: int, channels: int = 2, dtype=torch.float64):
    """Sprites (P, C, S, S), places (P,) and images (P,) of 3 images; the second has no object.

    The places are the four corners, the middles of the edges and the centre, one of them twice.
    """
    generator = torch.Generator().manual_seed(height * 100 + width)
    rows, columns = (0, height // 2, height - 1), (0, width // 2, width - 1)
    place = torch.tensor([r * width + c for r in rows for c in columns] + [0])
    image = torch.tensor([0, 2] * 5)
    sprites = torch.randn(10, channels, side, side, generator=generator, dtype=dtype)
    return sprites, place, image


def by_scipy(sprites, places, image, size) -> np.ndarray:
    """The sum over objects of sprite * place, each by scipy."""
    batch, height, width = size
    canvas = np.zeros((batch, sprites.shape[1], height, width))
    for sprite, place, b in zip(sprites.numpy(), places.numpy(), image):
        for channel, plane in enumerate(sprite):
            full = convolve2d(place.reshape(height, width), plane, mode="full")
            half = len(plane) // 2
            canvas[b, channel] += full[half:half + height, half:half + width]
    return canvas


def relaxed_places(count: int, places: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, places, generator=generator, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("height, width, side", CANVASES)
def test_one_hot_places_against_scipy(height, width, side) -> None:
    sprites, place, image = objects(height, width, side)
    size = (3, height, width)
    places = one_hot(place, height * width, torch.float64)
    canvas = place_sprites(sprites, places, image, size)
    assert np.allclose(canvas, by_scipy(sprites, places, image, size), atol=1e-12)
    assert (canvas[1] == 0).all()


@pytest.mark.parametrize("height, width, side", CANVASES)
def test_relaxed_places_against_scipy(height, width, side) -> None:
    sprites, _, image = objects(height, width, side)
    size = (3, height, width)
    places = relaxed_places(len(sprites), height * width)
    canvas = place_sprites(sprites, places, image, size)
    assert np.allclose(canvas, by_scipy(sprites, places, image, size), atol=1e-12)


def test_hard_and_relaxed_places_in_one_list() -> None:
    sprites, place, image = objects(5, 8, 3)
    places = one_hot(place, 40, torch.float64)
    places[::2] = relaxed_places(5, 40)
    canvas = place_sprites(sprites, places, image, (3, 5, 8))
    assert np.allclose(canvas, by_scipy(sprites, places, image, (3, 5, 8)), atol=1e-12)


def test_a_sprite_by_hand() -> None:
    """An asymmetric sprite keeps its orientation, and its centre is at the place."""
    sprite = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    place = one_hot(torch.tensor([0 * 4 + 2]), 12)  # row 0, column 2 of 3 x 4
    canvas = place_sprites(sprite, place, torch.tensor([0]), (1, 3, 4))
    assert canvas[0, 0].tolist() == [[0, 4, 5, 6], [0, 7, 8, 9], [0, 0, 0, 0]]


def test_no_objects() -> None:
    canvas = place_sprites(
        torch.zeros(0, 3, 5, 5), torch.zeros(0, 24), torch.zeros(0, dtype=torch.long), (2, 4, 6)
    )
    assert canvas.shape == (2, 3, 4, 6) and (canvas == 0).all()


@pytest.mark.parametrize("height, width, side", CANVASES)
def test_gradients_at_relaxed_places_against_finite_differences(height, width, side) -> None:
    sprites, _, image = objects(height, width, side)
    chosen = [0, 1, 4, 7]  # two objects in each of two images
    places = relaxed_places(4, height * width).requires_grad_()
    sprites = sprites[chosen].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, z: place_sprites(s, z, image[chosen], (3, height, width)), (sprites, places)
    )


@pytest.mark.parametrize("height, width, side", CANVASES)
def test_gradients_of_sprites_at_one_hot_places_against_finite_differences(
    height, width, side
) -> None:
    sprites, place, image = objects(height, width, side, channels=1)
    places = one_hot(place, height * width, torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: place_sprites(s, places, image, (3, height, width)), sprites.requires_grad_()
    )


def dense(sprites, places, image, size) -> torch.Tensor:
    """The same as one explicit convolution an object, which autograd differentiates."""
    batch, height, width = size
    canvas = [torch.zeros(sprites.shape[1], height, width, dtype=sprites.dtype)] * batch
    for sprite, place, b in zip(sprites, places, image.tolist()):
        kernel = sprite.flip(-1, -2)[:, None]  # conv2d correlates
        drawn = F.conv2d(place.view(1, 1, height, width), kernel, padding=sprite.shape[-1] // 2)
        canvas[b] = canvas[b] + drawn[0]
    return torch.stack(canvas)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("height, width, side", CANVASES)
def test_gradients_against_a_dense_convolution(height, width, side, hard) -> None:
    """At a one-hot place too, every pixel of the place map gets the linear operator's gradient."""
    sprites, place, image = objects(height, width, side)
    size = (3, height, width)
    places = one_hot(place, height * width, torch.float64)
    if not hard:
        places = relaxed_places(len(sprites), height * width)
    outer = torch.randn(3, 2, height, width, dtype=torch.float64)
    results = []
    for function in (place_sprites, dense):
        inputs = sprites.clone().requires_grad_(), places.clone().requires_grad_()
        canvas = function(*inputs, image, size)
        results.append((canvas.detach(), *torch.autograd.grad((canvas * outer).sum(), inputs)))
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert (results[0][2] != 0).all()


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("hard", [True, False])
def test_gradients_of_few_objects_against_a_dense_convolution(count, hard) -> None:
    sprites, place, image = (values[3:3 + count] for values in objects(5, 8, 3))
    places = one_hot(place, 40, torch.float64) if hard else relaxed_places(count, 40)
    inputs = sprites.requires_grad_(), places.requires_grad_()
    outer = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    ours = torch.autograd.grad((place_sprites(*inputs, image, (3, 5, 8)) * outer).sum(), inputs)
    if not count:
        assert [gradient.shape for gradient in ours] == [(0, 2, 3, 3), (0, 40)]
        return
    theirs = torch.autograd.grad((dense(*inputs, image, (3, 5, 8)) * outer).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.any() and torch.allclose(our, their, atol=1e-12)


def test_a_canvas_depends_on_the_draws_of_its_sprites_and_places() -> None:
    sprites, place, image = objects(5, 8, 3)
    places = one_hot(place, 40, torch.float64)
    tracked = (track_provenance(sprites, frozenset({"z_app"})),
               track_provenance(places, frozenset({"z_loc"})))
    canvas = place_sprites(*tracked, image, (3, 5, 8))
    assert get_provenance(canvas) == {"z_app", "z_loc"}
    assert torch.equal(detach_provenance(canvas), place_sprites(sprites, places, image, (3, 5, 8)))


@pytest.mark.parametrize("hard", [True, False])
def test_a_slope_limits_what_reaches_the_places_alone(hard) -> None:
    sprites, place, image = objects(5, 8, 3)
    places = one_hot(place, 40, torch.float64) if hard else relaxed_places(10, 40)
    outer = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    assert outer.abs().max() > 2
    inputs = sprites.requires_grad_(), places.requires_grad_()
    canvas = place_sprites(*inputs, image, (3, 5, 8), 0.5)
    free = dense(*inputs, image, (3, 5, 8))
    assert torch.allclose(canvas, free)
    for_sprites, for_places = torch.autograd.grad((canvas * outer).sum(), inputs)
    assert torch.allclose(
        for_sprites, torch.autograd.grad((free * outer).sum(), sprites, retain_graph=True)[0])
    limited = outer.clamp(-0.5, 0.5)
    assert torch.allclose(for_places, torch.autograd.grad((free * limited).sum(), places)[0])


@pytest.mark.parametrize("height, width, side", CANVASES)
@pytest.mark.parametrize("reach", [0, 1, 3])
def test_a_reach_keeps_the_gradient_near_the_place_and_0_at_it(height, width, side, reach) -> None:
    sprites, place, image = objects(height, width, side)
    places = one_hot(place, height * width, torch.float64).requires_grad_()
    outer = torch.randn(3, 2, height, width, dtype=torch.float64)
    size = (3, height, width)
    canvas = place_sprites(sprites, places, image, size, 0.5, reach)
    (ours,) = torch.autograd.grad((canvas * outer).sum(), places)
    free = dense(sprites, places, image, size)
    assert torch.allclose(canvas, free)
    (far,) = torch.autograd.grad((free * outer.clamp(-0.5, 0.5)).sum(), places)
    expected = torch.zeros_like(far)
    for i, at in enumerate(place.tolist()):
        for d in range(height * width):
            rows, columns = abs(d // width - at // width), abs(d % width - at % width)
            if max(rows, columns) <= reach:
                expected[i, d] = far[i, d] - far[i, at]
    assert torch.allclose(ours, expected, atol=1e-12)


def test_float32_stays_float32() -> None:
    sprites, place, image = objects(6, 6, 3, dtype=torch.float32)
    for places in (one_hot(place, 36), relaxed_places(10, 36).float()):
        places.requires_grad_()
        canvas = place_sprites(sprites, places, image, (3, 6, 6))
        canvas.sum().backward()
        assert canvas.dtype == places.grad.dtype == torch.float32


def test_transforms_take_the_next_size_of_small_factors() -> None:
    powers = [[p**e for e in range(9)] for p in (2, 3, 5, 7)]
    quick = sorted(math.prod(factors) for factors in itertools.product(*powers))
    assert [_fast(size) for size in range(1, 300)] == [
        next(q for q in quick if q >= size) for size in range(1, 300)]


@pytest.mark.parametrize("height, width, side", CANVASES)
def test_crops_are_slices_of_the_padded_image(height, width, side) -> None:
    _, place, image = objects(height, width, side)
    x = torch.randn(3, 2, height, width)
    taken = crops(x, place, side, image)
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (side // 2,) * 2, (side // 2,) * 2])
    for crop, d, b in zip(taken, place.tolist(), image.tolist()):
        row, column = divmod(d, width)
        assert (crop.numpy() == padded[b, :, row:row + side, column:column + side]).all()


@pytest.mark.parametrize("side", [1, 3, 5, 13])
@pytest.mark.parametrize("height, width", [(4, 4), (5, 8), (7, 3)])
def test_windows(height, width, side) -> None:
    places = torch.eye(height * width).view(height * width, 1, -1)  # any leading dimensions
    masks = window_masks(places.argmax(-1), side, (height, width))
    assert masks.shape == places.shape
    for d in range(height * width):
        expected = [
            float(max(abs(e // width - d // width), abs(e % width - d % width)) <= side // 2)
            for e in range(height * width)
        ]
        assert masks[d, 0].tolist() == expected


def peaks_by_brute_force(heights: np.ndarray, threshold: float, side: int) -> np.ndarray:
    half, found = side // 2, np.zeros(heights.shape, bool)
    for (row, column), value in np.ndenumerate(heights):
        window = heights[max(row - half, 0):row + half + 1, max(column - half, 0):column + half + 1]
        found[row, column] = value > threshold and value >= window.max()
    return found


@pytest.mark.parametrize("side", [1, 3, 5, 9])
@pytest.mark.parametrize("height, width", [(6, 6), (5, 8), (11, 3)])
def test_peaks_by_brute_force(height, width, side) -> None:
    generator = torch.Generator().manual_seed(side)
    smooth = torch.randn(20, height, width, generator=generator)
    # Whole numbers have ties everywhere; all below zero, padding with zeros would show.
    maps = torch.cat([smooth, smooth.mul(2).round(), smooth - 10])
    for threshold in (-100.0, 0.0, 1.0):
        expected = [peaks_by_brute_force(m.numpy(), threshold, side).tolist() for m in maps]
        assert find_peaks(maps, threshold, side).tolist() == expected


def test_peaks_by_hand() -> None:
    heights = torch.zeros(4, 5, 7)
    heights[0, 0, 0] = heights[0, 4, 6] = 3.0  # two corners
    heights[1, 2, 3], heights[1, 2, 4] = 3.0, 2.9  # a peak and its shoulder
    heights[2, 2, 3] = heights[2, 2, 4] = 3.0  # both of a tie are peaks
    heights[3, 2, 3] = 2.0  # at the threshold is not above it
    assert find_peaks(heights, 2.0, 3).nonzero().tolist() == [
        [0, 0, 0], [0, 4, 6], [1, 2, 3], [2, 2, 3], [2, 2, 4]]


def test_boxes_of_ink_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(40, 2, 5, 7, generator=generator) < 0.08
    masks[..., 2, 3] |= ~masks.flatten(2).any(-1)  # at least one pixel
    boxes = ink_boxes(masks)
    assert boxes.shape == (40, 2, 4)
    # Any leading dimensions.
    assert torch.equal(ink_boxes(masks[:, 0]), boxes[:, 0])
    assert torch.equal(ink_boxes(masks[0, 0]), boxes[0, 0])
    for box, mask in zip(boxes.view(-1, 4).tolist(), masks.view(-1, 5, 7).numpy()):
        (top, bottom), (left, right) = ((i.min(), i.max() + 1) for i in mask.nonzero())
        assert box == [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
