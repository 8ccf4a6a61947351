"""LAVAE's dreams: scenes whose truth is known by construction, and what a guide pays for them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_lavae import CONFIG, PAPER, Seen, lavae, peaks
from torch import Tensor, nn

from pyro_scenes.models.lavae import LAVAE, LAVAEConfig
from pyro_scenes.objectives.dreams import NEIGHBOURHOOD, dream, surprise
from pyro_scenes.objectives.lavae import LAVAEObjective, LAVAESchedule
from pyro_scenes.spatial import find_peaks


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Squares(nn.Module):
    """A sprite decoder of full squares of 3 x 3 pixels, in the first channel alone."""

    def __init__(self, mean: float = 1.0):
        super().__init__()
        self.mean = mean

    def forward(self, z: Tensor) -> Tensor:
        sprites = torch.zeros(len(z), 3, 5, 5)
        sprites[:, 0, 1:4, 1:4] = self.mean
        return sprites


def dreamer(batch: int, size: tuple[int, int] = (24, 28), **changes) -> tuple[LAVAE, Tensor]:
    """A model of squares, and images in each of which it finds one."""
    model = lavae(replace(CONFIG, max_objects=8, **changes), shape=(3, *size))
    model.sprite_net = Squares()
    model.location_net = peaks([[(4, 4, 3.0)]] * batch, size)
    return model, torch.zeros(batch, 3, *size)


def test_a_dream_is_its_sprites_at_its_places() -> None:
    model, x = dreamer(200)
    images, places = dream(model, x)
    assert images.shape == x.shape and places.shape == (200, 8)
    for image, row in zip(images, places.tolist(), strict=True):
        expected = np.zeros((3, 24, 28))
        for r, c in (divmod(place, 28) for place in row if place >= 0):
            assert 1 <= r < 23 and 1 <= c < 27  # whole on the canvas
            assert not expected[0, r - 1:r + 2, c - 1:c + 2].any()  # and on no other
            expected[0, r - 1:r + 2, c - 1:c + 2] = 1
        assert np.array_equal(image, expected)


def test_a_dream_leaves_batch_normalisation_as_it_was() -> None:
    model = LAVAE(PAPER, (3, 24, 28)).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    dream(model, torch.rand(4, 3, 24, 28).round())
    assert model.training and before
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_dreams_have_all_counts_and_pairs_that_touch() -> None:
    model, x = dreamer(500)
    _, places = dream(model, x)
    counts = (places >= 0).sum(1)
    assert set(counts.tolist()) == set(range(9))
    pairs = 0
    for row in places.tolist():
        found = [divmod(place, 28) for place in row if place >= 0]
        pairs += any(
            max(abs(r - s), abs(c - d)) == 3 for r, c in found for s, d in found
        )
    # Of 8 objects at random, 28 pairs of 1 / 24 each would touch at most.
    assert pairs > 0.5 * (counts > 1).sum()


def test_no_place_is_in_the_window_that_another_shuts() -> None:
    model, x = dreamer(200, blocked_window=11)
    _, places = dream(model, x)
    for row in places.tolist():
        found = [divmod(place, 28) for place in row if place >= 0]
        for i, (r, c) in enumerate(found):
            assert all(max(abs(r - s), abs(c - d)) > 5 for s, d in found[:i])


def test_dreams_are_as_binary_as_the_images() -> None:
    model, x = dreamer(100, blocked_window=7)  # so far apart that none shares a pixel
    model.sprite_net = Squares(0.7)
    drawn, places = dream(model, x)
    assert ((drawn == 0) | (drawn == 1)).all()
    assert drawn.sum() == pytest.approx(0.7 * 9 * int((places >= 0).sum()), rel=0.1)
    means, places = dream(model, x + 0.5)
    assert means.unique().tolist() == pytest.approx([0.0, 0.7])
    assert means.sum() == pytest.approx(0.7 * 9 * int((places >= 0).sum()), rel=1e-4)


def test_dreams_are_black_where_nothing_is_found() -> None:
    model, x = dreamer(4)
    model.location_net = Seen(torch.zeros(4, 24, 28))
    images, places = dream(model, x)
    assert (images == 0).all() and (places == -1).all()


def test_the_surprise_by_hand() -> None:
    """One object counted, one missed, and a peak too many; softmax over the neighbours of each."""
    config = LAVAEConfig(count_threshold=0.5, count_softness=0.3, count_window=9, sprite=5, crop=7)
    model = LAVAE(config, (1, 32, 32))
    found = [(6, 6, 3.0), (6, 7, 1.0), (20, 20, 0.4), (10, 26, 0.6)]
    model.location_net = peaks([found, []], (32, 32))
    places = torch.full((2, 10), -1)
    places[0, 3], places[0, 7] = 6 * 32 + 6, 20 * 32 + 21  # the second's peak is a pixel beside it
    x = torch.zeros(2, 1, 32, 32)
    gamma, soft = math.log(32 * 32), 0.3

    def missed(height: float) -> float:
        return math.log1p(math.exp(-(height - 0.5) / soft))

    def counted(height: float) -> float:
        return math.log1p(math.exp((height - 0.5) / soft))

    background = NEIGHBOURHOOD**2 - 2
    first = math.log(math.exp(3 * gamma) + math.exp(gamma) + background) - 3 * gamma
    second = math.log(1 + math.exp(0.4 * gamma) + background)
    heights = model.location_net(x)
    flat = find_peaks(heights, 0.0, 9)  # pixels of the flat background are no peaks, being 0
    assert flat[0].sum() == 3 and flat[1].sum() == 0
    expected = missed(3.0) + first + missed(0.0) + second + counted(0.6)
    assert surprise(model, x, places).tolist() == pytest.approx([expected, 0.0], rel=1e-4)


def sleeper(steps: int = 60, **changes) -> tuple[LAVAEObjective, LAVAE, Tensor]:
    """The training of a model that draws squares, and images of squares."""
    config = replace(CONFIG, max_objects=4, count_threshold=0.5, logit_scale=1.0)
    model = LAVAE(config, (3, 24, 28))
    model.sprite_net = Squares()
    x = torch.zeros(16, 3, 24, 28)
    for i in range(16):
        x[i, 0, i:i + 3, 4:7] = x[i, 0, i:i + 3, 16:19] = 1.0
    schedule = LAVAESchedule(warmup_full=0, warmup_end=0, **changes)
    return LAVAEObjective(schedule, model, steps), model, x


def test_the_last_steps_are_dreams_and_teach_the_location_network_alone() -> None:
    for dreams, awake in ((4, 56), (40, 50)):  # a sixth of the steps at most
        learning, model, x = sleeper(dreams=dreams)
        for step in (awake - 1, awake, 59, 60):  # beyond the end it is as awake at the end
            model.zero_grad()
            figures = learning.backward(model, x, step)
            taught = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
            asleep = awake <= step < 60
            assert (set(figures) == {"surprise"}) == asleep
            assert (taught == {"location_net"}) == asleep and "location_net" in taught


def test_learning_rates_fall_twice() -> None:
    learning, _, _ = sleeper(
        6000, dreams=500, dream_learning_rate=0.5, ramp=100, decay_from=0.5, decay_to=0.01,
        location_learning_rate=1.0,
    )
    rates = [learning.learning_rates(step)["location"] for step in range(6000)]
    assert rates[0] < 0.01 and rates[100] == rates[2750] == 1.0  # a rise, and a cosine from half
    assert rates[4125] == pytest.approx(0.505) and rates[5499] == pytest.approx(0.01, rel=1e-3)
    assert rates[5500] < 0.01 and 0.4 < max(rates[5500:]) < 0.5
    assert rates[5999] == pytest.approx(0.005, rel=1e-2)
    without, _, _ = sleeper(5500, ramp=100, decay_from=0.5, decay_to=0.01,
                            location_learning_rate=1.0)
    assert rates[:5500] == [without.learning_rates(step)["location"] for step in range(5500)]


def test_dreams_teach_to_find_objects_that_touch() -> None:
    """From scenes of two that are far apart, and a network that finds nothing but a centre."""
    learning, model, x = sleeper(6000, dreams=500)

    def touching(number: int) -> Tensor:
        scenes = torch.zeros(number, 3, 24, 28)
        for i in range(number):
            row, column = 2 + i % 12, 3 + i % 17
            scenes[i, 0, row:row + 3, column:column + 3] = 1.0
            scenes[i, 0, row + 3:row + 6, column + 1:column + 4] = 1.0
        return scenes

    pairs = touching(50)
    optimizer = torch.optim.Adam(model.location_net.parameters(), 3e-3)
    # The untrained network finds something everywhere, which lends sprites enough.
    model.location_net.head.bias.data.fill_(0.0)
    right = []
    for step in range(500):
        if step in (0, 499):
            right.append(float((model.infer(pairs, math.inf).present.sum(1) == 2).float().mean()))
        optimizer.zero_grad()
        learning.backward(model, x, 5500 + step)
        optimizer.step()
    assert right[0] < 0.5 < 0.9 < right[1]
