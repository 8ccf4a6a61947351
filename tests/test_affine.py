"""Affine windows against the paper's matrices, their inverses, known shifts and rotations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from pyro_scenes.affine import LEAST, grid, read, to_image, to_window, warp, windows, write


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random(count: int):
    """Scales of both signs, angles, shears and translations in float64."""
    scale = (0.05 + 2 * torch.rand(count, 2).double()) * torch.sign(torch.randn(count, 2)).double()
    return (scale, 4 * torch.randn(count).double(), torch.randn(count, 2).double(),
            2 * torch.randn(count, 2).double())


def still(count: int = 1, scale=1.0, angle=0.0, shear=(0.0, 0.0), translation=(0.0, 0.0)):
    """The same arguments so many times, float32."""
    return (torch.full((count, 2), scale), torch.full((count,), angle),
            torch.tensor([shear] * count), torch.tensor([translation] * count))


def test_the_matrix_is_the_papers() -> None:
    scale, angle, shear, translation = random(50)
    ours = to_image(scale, angle, shear, translation)
    for i in range(50):
        one = [values[i].tolist() for values in (scale, angle, shear, translation)]
        (sx, sy), w, (kx, ky), (tx, ty) = one
        t_st = np.array([[sx, 0, tx], [0, sy, ty], [0, 0, 1]])
        t_r = np.array([[math.cos(w), math.sin(-w), 0], [math.sin(w), math.cos(w), 0], [0, 0, 1]])
        t_k = np.array([[1 + kx * ky, kx, 0], [ky, 1, 0], [0, 0, 1]])
        assert np.allclose(ours[i], t_st @ t_r @ t_k, atol=1e-12)


def test_each_transform_is_the_others_inverse() -> None:
    arguments = random(2000)
    product = to_window(*arguments) @ to_image(*arguments)
    assert (product - torch.eye(3).double()).abs().max() < 1e-10


@pytest.mark.parametrize("transform", [to_image, to_window])
def test_windows_of_any_leading_dimensions(transform) -> None:
    arguments = random(6)
    together = transform(*arguments)
    wide = transform(*(v.unflatten(0, (2, 3)) for v in arguments))
    assert torch.equal(wide, together.view(2, 3, 3, 3))
    for i in range(6):
        one = transform(*(v[i] for v in arguments))
        assert torch.allclose(one, together[i], rtol=1e-12)
        assert torch.allclose(grid(one, (5, 8)), grid(wide, (5, 8)).flatten(0, 1)[i], rtol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-9, LEAST / 2])
def test_a_scale_near_zero_has_an_inverse(scale: float) -> None:
    arguments = [v.double().requires_grad_() for v in still(3, scale, 0.3, (0.2, -0.1), (0.5, 0.1))]
    product = to_window(*arguments) @ to_image(*arguments)
    assert torch.allclose(product, torch.eye(3).double().expand(3, 3, 3), atol=1e-10)
    image = torch.rand(3, 1, 8, 8).double().requires_grad_()
    window = warp(image, to_image(*arguments), (6, 6))
    canvas = warp(window, to_window(*arguments), (8, 8))
    canvas.square().sum().backward()
    assert all(v.grad.isfinite().all() for v in (*arguments, image))


def test_the_whole_image_is_the_image() -> None:
    image = torch.rand(2, 3, 10, 14)
    assert torch.allclose(warp(image, to_image(*still(2)), (10, 14)), image, atol=1e-6)
    assert torch.allclose(warp(image, to_window(*still(2)), (10, 14)), image, atol=1e-6)


def test_a_window_is_a_slice() -> None:
    """A window of 4 x 4 pixels of 16 x 16, its top left corner at row 9, column 3."""
    image = torch.rand(1, 2, 16, 16)
    centre = ((3 + 2) / 8 - 1, (9 + 2) / 8 - 1)  # x, y
    arguments = still(scale=0.25, translation=centre)
    window = warp(image, to_image(*arguments), (4, 4))
    assert torch.allclose(window, image[:, :, 9:13, 3:7], atol=1e-6)
    canvas = warp(window, to_window(*arguments), (16, 16))
    assert torch.allclose(canvas[:, :, 9:13, 3:7], window, atol=1e-6)
    outside = canvas.clone()
    outside[:, :, 8:14, 2:8] = 0.0  # bilinear edges are a pixel wide
    assert (outside == 0).all()


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns(quarters: int) -> None:
    image = torch.rand(1, 1, 9, 9)
    window = warp(image, to_image(*still(angle=quarters * math.pi / 2)), (9, 9))
    # The window turns clockwise, so that what it sees turns the other way.
    assert torch.allclose(window, torch.rot90(image, quarters, (-2, -1)), atol=1e-5)


def test_a_grid_is_torchs() -> None:
    transform = to_image(*random(12))
    theirs = F.affine_grid(transform[:, :2], [12, 1, 5, 8], align_corners=False)
    ours = grid(transform.view(3, 4, 3, 3), (5, 8))
    assert ours.shape == (3, 4, 5, 8, 2) and torch.allclose(ours.flatten(0, 1), theirs)


def test_warping_against_scipy() -> None:
    scale, angle, shear, translation = random(8)
    scale, translation = 0.5 + 0.2 * scale.abs(), 0.2 * translation
    image = torch.rand(8, 1, 12, 10).double()
    ours = warp(image, to_image(scale, angle, shear, translation), (7, 11))
    for i, t in enumerate(to_image(scale, angle, shear, translation).numpy()):
        row, column = np.meshgrid((np.arange(7) + 0.5) / 3.5 - 1, (np.arange(11) + 0.5) / 5.5 - 1,
                                  indexing="ij")
        x, y, _ = np.einsum("ij,jhw->ihw", t, np.stack([column, row, np.ones_like(row)]))
        at = [(y + 1) * 6 - 0.5, (x + 1) * 5 - 0.5]
        # A frame of zeros, for scipy's bilinear edges to be ours.
        framed = np.pad(image[i, 0].numpy(), 1)
        theirs = ndimage.map_coordinates(framed, [a + 1 for a in at], order=1, cval=0.0)
        assert np.allclose(ours[i, 0], theirs, atol=1e-9)


def test_a_window_survives_its_way_through_the_image() -> None:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 24),
                                   indexing="ij")
    smooth = torch.exp(-4 * (rows**2 + 2 * columns**2))[None, None]
    arguments = still(scale=0.4, angle=0.7, shear=(0.2, -0.1), translation=(0.1, -0.2))
    image = warp(smooth, to_window(*arguments), (96, 96))
    again = warp(image, to_image(*arguments), (24, 24))
    assert (again - smooth).abs().max() < 0.03 and image.sum() > 10


def test_several_windows_are_what_each_is_alone() -> None:
    scale, angle, shear, translation = (values.float() for values in random(6))
    transform = to_image(0.5 + 0.2 * scale.abs(), angle, shear, 0.2 * translation).view(2, 3, 3, 3)
    image = torch.rand(2, 2, 9, 12)
    together = windows(image, transform, 5)
    assert together.shape == (2, 3, 2, 5, 5) and together.std() > 0.1
    for n in range(2):
        for k in range(3):
            alone = warp(image[n:n + 1], transform[n, k][None], (5, 5))
            assert torch.allclose(together[n, k], alone[0], atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_upright_windows_are_those_of_the_whole_transform(channels: int) -> None:
    scale, angle, shear, translation = random(20)
    angle, shear = torch.zeros_like(angle), torch.zeros_like(shear)
    image = torch.rand(20, channels, 11, 14).double()
    outcomes = []
    for plain in (True, False):
        arguments = [v.clone().requires_grad_() for v in (image, scale, translation)]
        source, s, t = arguments
        if plain:
            seen = warp(source, to_image(s, angle, shear, t), (5, 6))
            drawn = warp(seen, to_window(s, angle, shear, t), (11, 14))
        else:
            seen = read(source, s, t, (5, 6))
            drawn = write(seen, s, t, (11, 14))
        (drawn.square().sum() + seen.square().sum()).backward()
        outcomes.append([seen, drawn, *(v.grad for v in arguments)])
    for whole, apart in zip(*outcomes, strict=True):
        assert whole.std() > 0 and torch.allclose(whole, apart, atol=1e-9)
