"""Where guides look, the angles they find and what they think templates are worth."""

import math

import pytest
import torch
from torch import Tensor

from pyro_scenes.affine import to_image, to_window, warp, windows
from pyro_scenes.attention import InkPeak, TurnSearch, gain, glimpse, halves


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- a glimpse -----------------------------------------------------------------------------------


def test_a_glimpse_is_the_picture_pixel_for_pixel() -> None:
    """Where neither sides nor columns and rows are alike; and 0 beyond the edge."""
    x = torch.rand(2, 1, 10, 14)
    middles = torch.tensor([[6.5, 4.5], [12.5, 1.5]])  # of pixels: columns 4 to 8, rows 2 to 6
    found = glimpse(x, middles / torch.tensor([7.0, 5.0]) - 1, 5)
    torch.testing.assert_close(found[0], x[0, :, 2:7, 4:9])
    torch.testing.assert_close(found[1, :, 1:, :4], x[1, :, :4, 10:])
    assert not found[1, :, 0].any() and not found[1, :, :, 4].any()


# --- halves of the ink ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 36), (23, 31)])
@pytest.mark.parametrize("second", [(22, 9, 6, 0.5), (9, 17, 5, 2.0), (21, 18, 3, 1.0)])
def test_halves_part_what_lies_apart(size, second) -> None:
    """What is too much on the canvas is no ink."""
    picture = blobs(size, [(8, 8, 5, 1.0), second])
    picture[:, 0, 0, -1] = -9.0
    parts = halves(torch.cat([picture, picture.flip(-1), 0 * picture]))
    assert parts.shape == (3, 1, *size) and set(parts.unique().tolist()) <= {0.0, 1.0}
    ink = picture.clamp(min=0).sum(1, keepdim=True)
    alone = blobs(size, [(8, 8, 5, 1.0)]).sum(1, keepdim=True)
    for part, image, one in ((parts[:1], ink, alone), (parts[1:2], ink.flip(-1), alone.flip(-1))):
        assert any(torch.equal(half * image, one) for half in (part, 1 - part))


def test_halves_of_one_blob_have_as_much_ink() -> None:
    picture = blobs((24, 36), [(10, 8, 4, 1.0), (14, 8, 4, 1.0)])  # twice as wide as high
    share = float((halves(picture) * picture).sum() / picture.sum())
    assert share == pytest.approx(0.5)


# --- the peak ------------------------------------------------------------------------------------


def blobs(size: tuple[int, int], squares: list[tuple[float, float, int, float]]) -> Tensor:
    """A picture (1, 2, H, W) of squares (x, y of the centre, side, ink)."""
    picture = torch.zeros(1, 2, *size)
    for x, y, side, ink in squares:
        top, left = round(y - side / 2), round(x - side / 2)
        picture[:, :, top:top + side, left:left + side] += ink
    return picture


def pixels(place: Tensor, size: tuple[int, int]) -> list[float]:
    half = torch.tensor([size[1] / 2, size[0] / 2])
    return (half * (place + 1)).squeeze(0).tolist()


@pytest.mark.parametrize("size", [(24, 36), (23, 31)])
def test_the_peak_is_where_most_ink_is_and_then_where_the_next_is(size) -> None:
    peak = InkPeak(blur=2.0, shut=4.0)
    # By ink: 36, 25, 18; what is to be taken away counts nothing, however much and near.
    squares = [(8, 7, 6, 1.0), (27.5, 5.5, 5, 1.0), (23, 17, 6, 0.5), (8.5, 13.5, 7, -5.0)]
    picture = blobs(size, squares)
    found: list[Tensor] = []
    for x, y, *_ in squares[:3]:
        centre = peak(picture, found)
        assert pixels(centre, size) == pytest.approx([x, y], abs=1.5)
        found.append(centre)


def test_each_picture_has_a_peak_of_its_own() -> None:
    peak, size = InkPeak(blur=2.0, shut=4.0), (24, 24)
    left, right = blobs(size, [(7, 7, 6, 1.0)]), blobs(size, [(17, 15, 6, 1.0)])
    both = peak(torch.cat([left, right]), [])
    assert pixels(both[:1], size) == pytest.approx([7, 7], abs=1e-4)
    assert pixels(both[1:], size) == pytest.approx([17, 15], abs=1e-4)
    # What was found in one picture shuts nothing in the other.
    again = peak(torch.cat([left + right, left + right]), [both])
    assert torch.allclose(again, both.flip(0), atol=1e-5)


def test_ink_counts_with_what_is_around_it() -> None:
    """A single bright pixel has more ink than any pixel of a dim square, and less in all."""
    picture = blobs((24, 24), [(4.5, 4.5, 1, 1.0), (16, 16, 4, 0.4)])
    assert pixels(InkPeak(2.0, 4.0)(picture, []), (24, 24)) == pytest.approx([16, 16], abs=1.5)


# --- the angle -----------------------------------------------------------------------------------


def smooth(spots: list[tuple[float, float, float]]) -> Tensor:
    """A template (1, 24, 24) of spots at (radius, angle) of some height."""
    y, x = torch.meshgrid(*[(torch.arange(24) + 0.5) / 12 - 1] * 2, indexing="ij")
    return sum(height * torch.exp(-20 * ((x - r * math.cos(a)) ** 2 + (y - r * math.sin(a)) ** 2))
               for r, a, height in spots)[None]


TEMPLATES = torch.stack([
    smooth([(0.3, 0.0, 1.0), (0.6, 1.9, 0.7), (0.0, 0.0, 0.8)]),
    smooth([(0.5, 0.4, 1.0), (0.7, 2.4, 0.6), (0.6, 4.5, 0.9)]),
])


@pytest.mark.parametrize("angles", [24, 36])
def test_a_known_rotation_is_found(angles) -> None:
    turn, size, count = TurnSearch(angles), (40, 56), 30
    angle = (2 * torch.rand(count) - 1) * math.pi
    scale = 0.25 + 0.1 * torch.rand(count, 2)
    centre = 0.6 * torch.rand(count, 2) - 0.3
    still, kind = torch.zeros_like(scale), torch.arange(count) % 2
    picture = warp(TEMPLATES[kind], to_window(scale, angle, still, centre), size)
    assert picture.flatten(1).sum(1).min() > 5
    # The other category's place is another, so that a mix-up of the two is seen.
    places = torch.stack([centre, centre], 1)
    places[torch.arange(count), 1 - kind] += 0.4
    found = turn(TEMPLATES, picture, scale[:, None].expand(-1, 2, -1), places)
    assert found.shape == (count, 2) and found.abs().max() <= math.pi
    off = found[torch.arange(count), kind] - angle
    assert torch.remainder(off + math.pi, 2 * math.pi).sub(math.pi).abs().max() < math.radians(3)


def test_a_template_that_is_not_turned_is_at_angle_0() -> None:
    picture = warp(TEMPLATES, to_window(torch.full((2, 2), 0.5), torch.zeros(2),
                                        torch.zeros(2, 2), torch.zeros(2, 2)), (48, 48))
    found = TurnSearch(36)(TEMPLATES, picture, torch.full((2, 2, 2), 0.5), torch.zeros(2, 2, 2))
    assert found.diagonal().tolist() == pytest.approx([0.0, 0.0], abs=math.radians(1))


# --- the worth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.2, 0.7])
def test_a_gain_is_a_difference_of_log_likelihoods(sigma) -> None:
    """A template of 4 x 4 pixels drawn at row 5, column 3 of each picture."""
    picture, template = torch.rand(5, 3, 12, 16), torch.rand(5, 3, 4, 4)
    centre = torch.tensor([[(3 + 2) / 8 - 1, (5 + 2) / 6 - 1]]).expand(5, 2)
    transform = to_image(torch.tensor([[4 / 16, 4 / 12]]).expand(5, 2), torch.zeros(5),
                         torch.zeros(5, 2), centre)
    canvas = torch.zeros_like(picture)
    canvas[:, :, 5:9, 3:7] = template
    with_it, without = (
        torch.distributions.Normal(mean, sigma).log_prob(picture).sum((1, 2, 3))
        for mean in (canvas, torch.zeros_like(picture))
    )
    seen = windows(picture, transform[:, None], 4)  # (5, 1, 3, 4, 4)
    found = gain(seen, template[:, None], torch.ones(5, 1), sigma)
    assert torch.allclose(found.squeeze(1), with_it - without, rtol=1e-4, atol=1e-3)
    assert (found > 0).any() and (found < 0).any() or found.std() > 1  # they do differ


def test_a_gain_counts_cells_by_their_area() -> None:
    """A template of 24 x 24 cells, drawn 48 x 48 pixels large."""
    template = TEMPLATES[:1]
    drawn = warp(template, to_window(*place(0.5)), (96, 96))
    picture = 0.9 * drawn + 0.1 * drawn.roll(5, -1)
    truth = (picture.square() - (picture - drawn).square()).sum() / (2 * 0.3**2)
    seen = warp(picture, to_image(*place(0.5)), (24, 24))
    found = gain(seen, template, torch.tensor([4.0]), 0.3)
    assert found.item() == pytest.approx(truth.item(), rel=0.03)


def place(scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A window in the middle of a picture."""
    return torch.full((1, 2), scale), torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2)


def test_ink_at_an_edge_of_an_odd_side_counts_as_much_as_elsewhere() -> None:
    """A line of one pixel in the last of 15 columns has less ink than one of two in the middle."""
    picture = torch.zeros(1, 1, 15, 15)
    picture[..., 14], picture[..., 6:8] = 0.6, 0.35
    assert pixels(InkPeak(0.5, 4.0)(picture, []), (15, 15))[0] == pytest.approx(7, abs=1.5)
