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


# --- categories in their places ------------------------------------------------------------------

NONE = (np.nan,) * 4


def boxes(*images):
    """Images of (x, y, side) or None to (N, M, 4) boxes."""
    return np.array([
        [NONE if one is None else (*one[:2], one[2], one[2]) for one in image] for image in images
    ], dtype=float).reshape(len(images), -1, 4)


def in_order(true):
    """Every object found in its own slot."""
    return np.broadcast_to(np.arange(np.shape(true)[1]), np.shape(true))


def test_matching_finds_each_object_its_own():
    # Slots in another order, one inferred object too many in the first image, one too few in the
    # second; absent ones in between.
    true = boxes([(10, 10, 8), None, (30, 10, 8)], [(5, 5, 8), (25, 25, 8), None])
    inferred = boxes([(31, 11, 8), (50, 50, 8), (9, 10, 8)], [None, (24, 26, 8), None])
    matches = metrics.match_by_place(inferred, torch.tensor(true))
    assert matches.tolist() == [[2, -1, 0], [-1, 1, -1]]
    assert matches.dtype == np.int64


def test_matching_takes_boxes_that_have_gradients() -> None:
    true = torch.tensor(boxes([(10, 10, 8), (30, 10, 8)]))
    inferred = true.flip(1).requires_grad_()
    assert metrics.match_by_place(inferred, true).tolist() == [[1, 0]]


def test_matching_is_of_all_objects_at_once():
    # The object at 10 is nearest to both, yet each can be matched: pairs come before distances.
    true = boxes([(10, 0, 10), (16, 0, 10)])
    assert metrics.match_by_place(boxes([(12, 0, 1), (7, 0, 1)]), true).tolist() == [[1, 0]]
    # With both within reach of both the sum counts: 1 + 3 rather than 3 + 5.
    assert metrics.match_by_place(boxes([(13, 0, 1), (11, 0, 1)]), true).tolist() == [[1, 0]]
    # One inferred object cannot be two.
    assert metrics.match_by_place(boxes([(14, 0, 1)]), true).tolist() == [[-1, 0]]


def test_matching_goes_as_far_as_half_the_larger_side_of_the_true_box():
    true = np.array([[[0, 0, 10, 4]], [[0, 0, 4, 10]], [[0, 0, 4, 4]], [[0, 0, 8, 8]]], float)
    inferred = np.array([[[3, 4, 1, 1]]] * 3 + [[[3, 4, 40, 40]]], float)  # 5 pixels away
    assert metrics.match_by_place(inferred, true).tolist() == [[0], [0], [-1], [-1]]
    assert metrics.match_by_place(inferred, true, 5).tolist() == [[0], [0], [0], [0]]
    assert metrics.match_by_place(inferred, true, 4.99).tolist() == [[-1], [-1], [-1], [-1]]
    assert metrics.match_by_place(inferred + 1e6, true, np.inf).tolist() == [[0], [0], [0], [0]]
    assert metrics.match_by_place(true, true, 0).tolist() == [[0], [0], [0], [0]]


def test_matching_without_objects():
    some, nothing = boxes([(1, 1, 4)], [(2, 2, 4)]), boxes([None], [None])
    slots = np.zeros((2, 0, 4))
    for inferred, true in ((nothing, some), (some, nothing), (slots, some)):
        assert metrics.match_by_place(inferred, true, np.inf).tolist() == [[-1], [-1]]
    assert metrics.match_by_place(some, slots).shape == (2, 0)
    assert metrics.match_by_place(some[:0], nothing[:0]).shape == (0, 1)


@pytest.mark.parametrize("inferred, true", [
    ((2, 3, 2), (2, 3, 4)), ((2, 3, 4), (2, 3, 2)), ((2, 3, 4), (1, 3, 4)), ((3, 4), (3, 4)),
])
def test_matching_refuses_other_shapes(inferred, true):
    with pytest.raises(ValueError, match=r"\(N, M, 4\)"):
        metrics.match_by_place(np.zeros(inferred), np.zeros(true))


@pytest.mark.parametrize("limit", [-1, np.nan])
def test_matching_refuses_a_limit_below_zero_or_nan(limit):
    with pytest.raises(ValueError, match="0 or more"):
        metrics.match_by_place(np.zeros((1, 1, 4)), np.zeros((1, 1, 4)), limit)


def brute_force_matching(inferred, true, limit):
    """Every way to give each true object a slot of its own or none: most pairs, then nearest."""
    best, found = (1, 0.0), []
    for slots in itertools.product(range(-1, len(inferred)), repeat=len(true)):
        taken = [slot for slot in slots if slot >= 0]
        apart = [np.hypot(*(inferred[slot, :2] - true[place, :2]))
                 for place, slot in enumerate(slots) if slot >= 0]
        reach = [max(true[place, 2:]) / 2 if limit is None else limit
                 for place, slot in enumerate(slots) if slot >= 0]
        if len(set(taken)) < len(taken) or not all(a <= r for a, r in zip(apart, reach)):
            continue
        if (-len(taken), sum(apart)) < best:
            best, found = (-len(taken), sum(apart)), list(slots)
    return found


@pytest.mark.parametrize("limit", [None, 4.0])
def test_matching_against_all_matchings(limit):
    random = np.random.default_rng(0)
    inferred, true = random.uniform(0, 12, (60, 4, 4)), random.uniform(0, 12, (60, 3, 4))
    inferred[random.random((60, 4)) < 0.2] = np.nan
    true[random.random((60, 3)) < 0.2] = np.nan
    matches = metrics.match_by_place(inferred, true, limit)
    expected = [brute_force_matching(i, t, limit) for i, t in zip(inferred, true)]
    assert matches.tolist() == expected
    assert {sum(slot >= 0 for slot in slots) for slots in expected} == {0, 1, 2, 3}


def test_swapped_places_count_for_the_paper_and_not_in_place():
    # Two images right; in the third the two categories have changed places.
    true = np.array([[0, 1], [0, 1], [0, 1]])
    kind = np.array([[7, 5], [7, 5], [5, 7]])
    at = boxes(*[[(10, 10, 8), (30, 30, 8)]] * 3)
    matches = metrics.match_by_place(at, at)
    assert metrics.category_correspondence(kind, true) == 1.0
    assert metrics.placed_correspondence(kind, true, matches) == pytest.approx(4 / 6)
    assert metrics.purity(kind, true, matches) == pytest.approx(4 / 6)
    # Slots in another order change nothing: the places tell.
    matches = metrics.match_by_place(at[:, ::-1], at)
    assert metrics.placed_correspondence(kind[:, ::-1], true, matches) == pytest.approx(4 / 6)


def test_unmatched_objects_are_not_found():
    # Right categories, one of three objects 20 pixels off.
    true, kind = np.array([[0, 1], [0, -1]]), np.array([[0, 1], [0, -1]])
    at = boxes([(10, 10, 8), (30, 30, 8)], [(10, 10, 8), None])
    off = boxes([(10, 10, 8), (30, 50, 8)], [(10, 10, 8), None])
    matches = metrics.match_by_place(off, at)
    assert metrics.category_correspondence(kind, true) == 1.0
    assert metrics.placed_correspondence(kind, true, matches) == pytest.approx(2 / 3)
    assert metrics.purity(kind, true, torch.tensor(matches)) == pytest.approx(2 / 3)


def test_more_categories_than_labels_can_be_pure_and_not_correspond():
    true, kind = np.array([[0, 0, 1, 1]]), np.array([[4, 5, 6, 7]])
    assert metrics.placed_correspondence(kind, true, in_order(true)) == 0.5
    assert metrics.purity(kind, true, in_order(true)) == 1.0
    # More labels than categories: neither can be whole.
    assert metrics.placed_correspondence(true, kind, in_order(true)) == 0.5
    assert metrics.purity(true, kind, in_order(true)) == 0.5


def test_purity_takes_the_commonest_label_of_each_category():
    # Category 3 holds labels 0 0 0 1, category 8 holds 0 1 1 and a superfluous object.
    kind = np.array([[3, 3, 8], [3, 3, 8], [8, 8, -1]])
    true = np.array([[0, 0, 0], [0, 1, 1], [1, -1, -1]])
    assert metrics.purity(kind, true, in_order(true)) == pytest.approx(5 / 7)
    # Both are 0 most often: purity lets both be, a one-to-one map does not.
    true = np.array([[0, 0, 0], [0, 1, 0], [1, -1, -1]])
    assert metrics.purity(kind, true, in_order(true)) == pytest.approx(5 / 7)
    assert metrics.placed_correspondence(kind, true, in_order(true)) == pytest.approx(4 / 7)


PLACED = [metrics.placed_correspondence, metrics.purity]


@pytest.mark.parametrize("figure", PLACED)
def test_placed_figures_without_labels_or_objects(figure):
    some, nothing = np.array([[0, 1], [2, -1]]), np.full((2, 2), -1)
    assert figure(some, nothing, nothing) is None
    assert figure(some, nothing, in_order(some)) is None
    assert figure(some, some[:, :0], some[:, :0]) is None
    assert figure(some, some, nothing) == 0.0
    # A partner without a category is no object.
    assert figure(nothing, some, in_order(some)) == 0.0
    assert figure(some[:, :0], some, nothing) == 0.0
    # Something where there is no label costs nothing.
    assert figure(np.array([[0, 1], [2, 2]]), some, in_order(some)) == 1.0


@pytest.mark.parametrize("figure", PLACED)
def test_placed_figures_refuse_what_does_not_agree(figure):
    kind, true = np.zeros((2, 3), int), np.zeros((2, 2), int)
    with pytest.raises(ValueError, match=r"\(N, M\)"):
        figure(kind[:1], true, in_order(true))
    with pytest.raises(ValueError, match=r"\(N, M\)"):
        figure(kind[0], true, in_order(true))
    with pytest.raises(ValueError, match="like the labels"):
        figure(kind, true, in_order(kind))
    with pytest.raises(ValueError, match="slot 3, of 3"):
        figure(kind, true, in_order(true) + 2)


def brute_force_placed(inferred, true, matches, renamings):
    """The best of some renamings, object by object."""
    best = 0
    for renamed in renamings:
        found = 0
        for guesses, labels, slots in zip(inferred, true, matches):
            for label, slot in zip(labels, slots):
                category = guesses[slot] if slot >= 0 else -1
                found += bool(label >= 0 and category >= 0 and renamed[category] == label)
        best = max(best, found)
    return best / (true >= 0).sum()


@pytest.mark.parametrize("seed", range(20))
def test_placed_figures_against_all_renamings(seed):
    random = np.random.default_rng(seed)
    kinds, slots = 4, random.integers(2, 5)
    inferred = random.integers(-1, random.integers(1, kinds + 1), size=(8, slots))
    true = random.integers(-1, random.integers(1, kinds + 1), size=(8, slots))
    true[0, 0] = 0
    # Half the objects agree with a hidden map, which merges categories for odd seeds.
    hidden = random.integers(0, 2, kinds) if seed % 2 else random.permutation(kinds)
    matches = np.array([random.permutation(slots) for _ in true])
    of_partner = np.take_along_axis(inferred, matches, 1)
    true = np.where((random.random(true.shape) < 0.5) & (of_partner >= 0) & (true >= 0),
                    hidden[of_partner], true)
    matches[random.random(true.shape) < 0.2] = -1
    one_to_one = list(itertools.permutations(range(kinds)))
    many_to_one = list(itertools.product(range(kinds), repeat=kinds))
    placed = metrics.placed_correspondence(inferred, true, matches)
    pure = metrics.purity(inferred, true, matches)
    assert placed == pytest.approx(brute_force_placed(inferred, true, matches, one_to_one))
    assert pure == pytest.approx(brute_force_placed(inferred, true, matches, many_to_one))
    assert placed <= min(pure, metrics.category_correspondence(inferred, true))


def test_classes_in_use():
    assert metrics.classes_in_use(torch.tensor([[7, -1, 3], [3, 0, -1]])) == 3
    assert metrics.classes_in_use(np.full((2, 3), -1)) == 0
    assert metrics.classes_in_use(np.zeros((0, 3), int)) == 0


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
