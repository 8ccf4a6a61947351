"""Metrics against hand-worked values, the papers' examples and brute force."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from pyro_scenes import metrics


def test_count_correct():
    correct = metrics.count_correct(np.array([0, 1, 3, 2]), np.array([0, 2, 3, 3]))
    assert correct.dtype == bool
    assert correct.tolist() == [True, False, True, False]


def test_count_correct_takes_tensors():
    correct = metrics.count_correct(torch.tensor([7, 6]), np.array([7, 7]))
    assert correct.tolist() == [True, False]


def test_counts_of_different_images_are_refused():
    with pytest.raises(ValueError, match="rank 1"):
        metrics.count_correct(np.zeros(3, int), np.zeros(4, int))
    with pytest.raises(ValueError, match="rank 1"):
        metrics.count_confusion(np.zeros((3, 1), int), np.zeros((3, 1), int))


def test_count_confusion_by_hand():
    confusion = metrics.count_confusion(
        inferred=torch.tensor([0, 3, 3, 8, 3]), true=np.array([0, 3, 2, 7, 3])
    )
    assert json.loads(json.dumps(confusion)) == {
        "true": [0, 2, 3, 7],
        "inferred": [0, 3, 8],
        "table": [[1, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 1]],
    }


def test_count_confusion_of_no_images():
    empty = np.zeros(0, int)
    assert metrics.count_confusion(empty, empty) == {"true": [], "inferred": [], "table": []}


def test_correspondence_of_the_papers_example():
    # Appendix D: 1 -> 4, 4 -> 0, 2 -> 1, 3 -> 5 explains every label.
    assert metrics.category_correspondence([[1, 4, 2, 2, 3]], [[4, 0, 1, 1, 5]]) == 1.0


def test_correspondence_uses_one_map_for_all_images():
    # Either image alone is perfect; together category 0 cannot mean both 0 and 1. The map
    # {0 -> 0, 1 -> 1} finds two of three labels, {0 -> 1, 1 -> 0} the other one.
    inferred = torch.tensor([[0, -1], [1, -1], [0, -1]])
    true = torch.tensor([[0, -1], [1, -1], [1, -1]])
    assert metrics.category_correspondence(inferred, true) == pytest.approx(2 / 3)


def test_correspondence_is_one_to_one():
    # Two categories for one label: only one of them can be renamed to it.
    assert metrics.category_correspondence([[4], [9]], [[0], [0]]) == 0.5
    # Two labels in one category: the same.
    assert metrics.category_correspondence([[4], [4]], [[0], [1]]) == 0.5


def test_correspondence_matches_multisets_and_ignores_order():
    # Three inferred of a kind against two labels: both labels found, the third costs nothing.
    assert metrics.category_correspondence([[5, 5, 5]], [[2, -1, 2]]) == 1.0
    # One inferred against two labels of a kind: one label is missed.
    assert metrics.category_correspondence([[5, -1, -1]], [[2, -1, 2]]) == 0.5
    assert metrics.category_correspondence([[0, 1], [1, 0]], [[0, 1], [0, 1]]) == 1.0


def test_correspondence_without_labels_or_objects():
    nothing = np.full((2, 3), -1)
    assert metrics.category_correspondence([[0, 1, 2], [0, 1, 1]], nothing) is None
    assert metrics.category_correspondence(nothing, [[0, 1], [2, -1]]) == 0.0
    assert metrics.category_correspondence(np.zeros((2, 0), int), [[0, 1], [2, -1]]) == 0.0


def test_correspondence_refuses_different_images():
    with pytest.raises(ValueError, match=r"\(N, M\)"):
        metrics.category_correspondence([[0], [1]], [[0]])


def brute_force_correspondence(inferred, true, kinds):
    """Appendix D to the letter: every permutation, every image, every label."""
    best = 0
    for renamed in itertools.permutations(range(kinds)):
        found = 0
        for guesses, labels in zip(inferred, true):
            pool = Counter(renamed[k] for k in guesses if k >= 0)
            for label in labels:
                if label >= 0 and pool[label]:
                    pool[label] -= 1
                    found += 1
        best = max(best, found)
    return best / (true >= 0).sum()


@pytest.mark.parametrize("seed", range(20))
def test_correspondence_against_all_permutations(seed):
    random = np.random.default_rng(seed)
    kinds = 5
    # Seeds differ in how many categories either side uses, and in the number of slots.
    inferred = random.integers(-1, random.integers(1, kinds + 1), size=(8, random.integers(1, 5)))
    true = random.integers(-1, random.integers(1, kinds + 1), size=(8, random.integers(1, 5)))
    true[0, 0] = 0
    exact = brute_force_correspondence(inferred, true, kinds)
    assert metrics.category_correspondence(inferred, true) == pytest.approx(exact, abs=1e-12)


def test_ari_by_hand():
    # Six pixels, true {a a a b b b}, inferred {1 1 2 2 3 3}: table [[2, 1, 0], [0, 1, 2]].
    # Pairs together in both 1 + 1 = 2, in the truth 3 + 3 = 6, in the guess 1 + 1 + 1 = 3, of 15:
    # (2 - 6 * 3 / 15) / ((6 + 3) / 2 - 6 * 3 / 15) = 0.8 / 3.3 = 8 / 33.
    # The background pixels say something else and must not count.
    true = np.array([[[0, 1, 1, 1], [2, 2, 2, 0]]])
    inferred = np.array([[[9, 1, 1, 2], [2, 3, 3, 1]]])
    assert metrics.foreground_ari(true, inferred) == pytest.approx([8 / 33])


def test_ari_special_cases():
    true = np.array([
        [[1, 1, 2, 2]],   # the same partition under other names
        [[1, 1, 2, 2]],   # all in one segment: no better than chance
        [[1, 1, 1, 0]],   # one object found whole
        [[1, 1, 1, 0]],   # one object cut in two
        [[3, 0, 0, 0]],   # a single pixel
        [[1, 2, 3, 4]],   # objects of a pixel each, all told apart
        [[1, 1, 2, 2]],   # each object cut in two, crosswise: (0 - 2/3) / (2 - 2/3)
        [[0, 0, 0, 0]],   # no object
    ])
    inferred = torch.tensor([
        [[7, 7, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 1]], [[0, 1, 1, 1]],
        [[5, 5, 5, 5]], [[4, 3, 2, 1]], [[1, 2, 1, 2]], [[0, 1, 2, 3]],
    ])
    index = metrics.foreground_ari(true, inferred)
    assert index[:7] == pytest.approx([1, 0, 1, 0, 1, 1, -0.5])
    assert np.isnan(index[7])


def brute_force_ari(true, inferred):
    """Hubert and Arabie's index, pair of pixels by pair of pixels."""
    pixels = [(t, i) for t, i in zip(true.ravel(), inferred.ravel()) if t]
    pairs = list(itertools.combinations(pixels, 2))
    same_true = sum(a[0] == b[0] for a, b in pairs)
    same_inferred = sum(a[1] == b[1] for a, b in pairs)
    together = sum(a == b for a, b in pairs)
    expected = same_true * same_inferred / len(pairs)
    return (together - expected) / ((same_true + same_inferred) / 2 - expected)


def test_ari_against_pair_counting():
    random = np.random.default_rng(0)
    true = random.integers(0, 4, size=(12, 5, 6)).astype(np.uint8)
    # From nearly right to random, with names that do not start at 0.
    wrong = random.random(true.shape) < np.linspace(0.02, 1, 12)[:, None, None]
    inferred = np.where(wrong, random.integers(0, 5, true.shape), true) + 3
    expected = [brute_force_ari(t, i) for t, i in zip(true, inferred)]
    assert metrics.foreground_ari(true, inferred) == pytest.approx(expected, abs=1e-12)
    assert expected[0] > 0.8 > 0.1 > expected[-1]


def test_ari_of_large_images_stays_exact():
    # More pixel pairs than 32 bits hold, and their product more than 64.
    true = np.ones((2, 512, 512), dtype=np.uint8)
    true[1, 256:] = 2
    index = metrics.foreground_ari(true, true)
    assert index.tolist() == [1.0, 1.0]


def test_ari_refuses_different_shapes():
    with pytest.raises(ValueError, match="rank 3"):
        metrics.foreground_ari(np.zeros((1, 4, 4), int), np.zeros((1, 4, 5), int))
