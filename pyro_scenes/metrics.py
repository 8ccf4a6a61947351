"""Figures of merit for inferred scenes: counts, categories and segmentations.

Each function takes numpy arrays or torch tensors, a batch at a time, and returns one figure per
image where the figure has one; means are left to the caller. All are fractions, never per cent.

Three figures say how unnamed categories agree with the labels; all are over every true label.

    category_correspondence  one-to-one names; labels of an image without places (the paper's)
    placed_correspondence    one-to-one names; the object must be found in its place, too
    purity                   many-to-one names; the object must be found in its place, too

So placed_correspondence is at most each of the others. More categories in use make purity easier,
up to one an object, which is why classes_in_use belongs beside it.

Categories have no names, so that 1 may stand for 4, and 0 for 7; -1 is no object:

>>> inferred, true = [[1, 0], [1, -1], [1, 0]], [[7, 4], [4, -1], [4, 4]]
>>> category_correspondence(inferred, true)
0.8

Counts and segmentations have a figure an image:

>>> count_correct(np.array([1, 2, 3]), np.array([1, 2, 2])).tolist()
[True, True, False]
>>> foreground_ari([[[0, 1, 1, 2, 2]]], [[[0, 5, 5, 0, 0]]]).tolist()
[1.0]
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import typing
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ArrayLike = typing.ArrayLike | Tensor  # lists of lists too


def count_correct(inferred: ArrayLike, true: ArrayLike) -> NDArray[np.bool_]:
    """Tell for which images the inferred number of objects is the true one.

    The mean over images is the count accuracy of table 1 of both the LAVAE paper (section 3.1) and
    the Discrete-AIR paper (section 3.1).

    Args:
        inferred: (B,) integers, the inferred counts.
        true: (B,) integers, the true counts.

    Returns:
        (B,) bool.

    Raises:
        ValueError: the shapes differ or are not (B,).
    """
    return np.equal(*_alike(inferred, true, rank=1))


def count_confusion(inferred: ArrayLike, true: ArrayLike) -> dict[str, list[Any]]:
    """Count the images with each pair of true and inferred number of objects.

    Args:
        inferred: (B,) integers, the inferred counts.
        true: (B,) integers, the true counts.

    Returns:
        A dictionary that JSON can hold: "true" and "inferred" list the counts that occur, in
        ascending order, and table[i][j] is the number of images with true[i] objects of which
        inferred[j] were inferred. The table's entries sum to B.

    Raises:
        ValueError: the shapes differ or are not (B,).
    """
    guesses, truths = _alike(inferred, true, rank=1)
    rows, columns, table = _cross(truths, guesses)
    return {"true": rows.tolist(), "inferred": columns.tolist(), "table": table.tolist()}


def category_correspondence(inferred: ArrayLike, true: ArrayLike) -> float | None:
    """Measure how well unnamed categories correspond to the true labels.

    This is R_corr of the Discrete-AIR paper, section 3 and appendix D: the inferred categories are
    renamed by the one-to-one map that serves the whole data set best, then the labels of each
    image, as a multiset without positions, are looked up in the renamed multiset of that image.
    The figure is the number of labels found over the number of labels.

    Under a fixed one-to-one map k -> t an image has min(inferred objects of k, labels t) of its
    labels t found. That is a sum over pairs (k, t), so the best map solves an assignment problem
    exactly. Where there are more categories on one side, those left over are mapped to nothing.

    Args:
        inferred: (N, M) integers, the category of each inferred object; negative for no object.
        true: (N, M') integers, the label of each true object; negative for no object.

    Returns:
        A fraction in [0, 1], or None where there is no label at all. Missing objects cost labels;
        superfluous objects cost nothing, as in the paper.

    Raises:
        ValueError: the two are not of rank 2 or differ in the number of images.
    """
    guesses, truths = _categories(inferred, true)
    labels = int((truths >= 0).sum())
    if not labels:
        return None
    guessed, present = _occurrences(guesses), _occurrences(truths)
    # (K, T): labels t found in the whole data set if category k is renamed t.
    found = np.array([np.minimum(one, present).sum(1) for one in guessed])
    if not found.size:
        return 0.0
    return float(found[linear_sum_assignment(found, maximize=True)].sum() / labels)


def match_by_place(
    inferred: ArrayLike, true: ArrayLike, limit: float | None = None
) -> NDArray[np.int64]:
    """Match the inferred objects of each image to its true ones by the centres of their boxes.

    An object has at most one partner, whose centre is no farther away than the limit. Of all such
    matchings of an image this is one with the most pairs, and of these the one with the least sum
    of distances: an assignment problem, in which a pair too far apart costs more than all others.

    Args:
        inferred: (N, M, 4) centre x, y, width, height in pixels; NaN for no object.
        true: (N, M', 4), the same.
        limit: the largest Euclidean distance in pixels, inclusive; None for half the larger side
            of the true box, which is about as far as the object reaches.

    Returns:
        (N, M') integers: the slot of each true object's partner, in 0..M-1; -1 where it has none.

    Raises:
        ValueError: the boxes are not (N, M, 4) and (N, M', 4), or the limit is negative or NaN.
    """
    guesses, truths = _numpy(inferred), _numpy(true)
    shapes = guesses.shape, truths.shape
    if any(len(s) != 3 or s[2] != 4 for s in shapes) or len(guesses) != len(truths):
        raise ValueError(f"boxes must be (N, M, 4) and (N, M', 4), not {shapes[0]} and {shapes[1]}")
    if limit is not None and not limit >= 0:
        raise ValueError(f"a limit on distances must be 0 or more, not {limit}")
    apart = guesses[:, :, None, :2].astype(np.float64) - truths[:, None, :, :2]
    distance = np.sqrt((apart**2).sum(-1))  # (N, M, M')
    reach = truths[:, None, :, 2:].max(-1) / 2 if limit is None else limit
    near = distance <= reach  # not where either is NaN
    nearest = np.where(near, distance, 0)
    cost = np.where(near, distance, 1 + nearest.sum((1, 2), keepdims=True))
    matches = np.full(truths.shape[:2], -1, dtype=np.int64)
    for image in np.flatnonzero(near.any((1, 2))):
        slot, place = linear_sum_assignment(cost[image])
        kept = near[image, slot, place]
        matches[image, place[kept]] = slot[kept]
    return matches


def placed_correspondence(
    inferred: ArrayLike, true: ArrayLike, matches: ArrayLike
) -> float | None:
    """Measure how well unnamed categories correspond to the labels of the objects in their place.

    Stricter than category_correspondence, and not in the paper: a label is found if its own object
    has a partner and the partner's category, renamed by the one-to-one map that serves the whole
    data set best, is that label. Where there are more categories on one side, those left over are
    mapped to nothing.

    Args:
        inferred: (N, M) integers, the category of each inferred object; negative for no object.
        true: (N, M') integers, the label of each true object; negative for no object.
        matches: (N, M') integers, what match_by_place gives.

    Returns:
        Labels found / labels, a fraction in [0, 1], at most category_correspondence; None where
        there is no label at all. An object without a partner costs its label; superfluous objects
        cost nothing.

    Raises:
        ValueError: the shapes do not agree, or a partner is not among the M slots.
    """
    table, labels = _matched(inferred, true, matches)
    found = table[linear_sum_assignment(table, maximize=True)].sum()
    return float(found / labels) if labels else None


def purity(inferred: ArrayLike, true: ArrayLike, matches: ArrayLike) -> float | None:
    """Measure how far each unnamed category holds objects of one label only.

    Each category takes the commonest label of its matched objects, so that several categories may
    share a label (many-to-one). A single object a category would be pure: compare only figures
    with the same number of classes in use. It is not the paper's figure.

    Args:
        inferred: (N, M) integers, the category of each inferred object; negative for no object.
        true: (N, M') integers, the label of each true object; negative for no object.
        matches: (N, M') integers, what match_by_place gives.

    Returns:
        Labels found / labels, a fraction in [0, 1], at least placed_correspondence; None where
        there is no label at all. An object without a partner costs its label; superfluous objects
        cost nothing.

    Raises:
        ValueError: the shapes do not agree, or a partner is not among the M slots.
    """
    table, labels = _matched(inferred, true, matches)
    return float(table.max(1, initial=0).sum() / labels) if labels else None


def classes_in_use(inferred: ArrayLike) -> int:
    """Count the categories that at least one inferred object of the whole data set has.

    Args:
        inferred: integers of any shape, the category of each object; negative for no object.

    Returns:
        0 or more.
    """
    categories = _numpy(inferred)
    return len(np.unique(categories[categories >= 0]))


def foreground_ari(true: ArrayLike, inferred: ArrayLike) -> NDArray[np.float64]:
    """Compute the adjusted Rand index of each image over the pixels of its true objects.

    The index is Hubert and Arabie's (1985): the number of pixel pairs on which two partitions
    agree, corrected for chance. Background pixels of the truth are left out; whatever the
    inferred map says of the others, background included, is one more cluster.

    Args:
        true: (B, H, W) integers, 0 for background, one positive integer per object.
        inferred: (B, H, W) integers, one per inferred segment.

    Returns:
        (B,) float, at most 1, about 0 for a partition by chance. Where the formula is 0/0, because
        both partitions put all pixels in one cluster (an image with one object, found whole) or
        each pixel in its own, it is 1. NaN where an image has no foreground.

    Raises:
        ValueError: the shapes differ or are not (B, H, W).
    """
    truths, guesses = _alike(true, inferred, rank=3)
    return np.array([
        _adjusted_rand(truth[truth != 0], guess[truth != 0])
        for truth, guess in zip(truths, guesses)
    ], dtype=np.float64)


def _adjusted_rand(true: NDArray[Any], inferred: NDArray[Any]) -> float:
    """Hubert and Arabie's index of two partitions given as (P,) labels; NaN without pixels."""
    if not len(true):
        return np.nan
    table = _cross(true, inferred)[2]
    together, same_true, same_inferred, pairs = (
        int((n * (n - 1)).sum()) // 2
        for n in (table, table.sum(1), table.sum(0), np.array(len(true)))
    )
    # Python integers: exact, so that the degenerate case below is recognised for any image size.
    # Multiplied by 2 * pairs, the index (together - expected) / (mean - expected) is this ratio.
    numerator = 2 * (pairs * together - same_true * same_inferred)
    denominator = pairs * (same_true + same_inferred) - 2 * same_true * same_inferred
    # Zero only if both partitions are one cluster, or both put each pixel in its own.
    return numerator / denominator if denominator else 1.0


def _occurrences(categories: NDArray[Any]) -> NDArray[np.int64]:
    """(N, M) categories to (K, N): how often each of the K that occur is in each image."""
    kinds = np.unique(categories[categories >= 0])
    return np.array(
        [(categories == kind).sum(1) for kind in kinds], dtype=np.int64
    ).reshape(len(kinds), len(categories))


def _matched(
    inferred: ArrayLike, true: ArrayLike, matches: ArrayLike
) -> tuple[NDArray[np.int64], int]:
    """(K, T) matched pairs of each category and label that occur in one, and the labels in all."""
    guesses, truths = _categories(inferred, true)
    slots = _numpy(matches)
    if slots.shape != truths.shape:
        raise ValueError(f"matches must be {truths.shape} like the labels, not {slots.shape}")
    if slots.max(initial=-1) >= guesses.shape[1]:
        raise ValueError(f"matches name slot {slots.max()}, of {guesses.shape[1]}")
    image, place = np.nonzero((slots >= 0) & (truths >= 0))
    category, label = guesses[image, slots[image, place]], truths[image, place]
    present = category >= 0
    return _cross(category[present], label[present])[2], int((truths >= 0).sum())


def _cross(
    first: NDArray[Any], second: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    """The values of two (P,) arrays, ascending, and how often each pair of them occurs."""
    rows, row = np.unique(first, return_inverse=True)
    columns, column = np.unique(second, return_inverse=True)
    table = np.bincount(row * len(columns) + column, minlength=len(rows) * len(columns))
    return rows, columns, table.reshape(len(rows), len(columns))


def _categories(inferred: ArrayLike, true: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    guesses, truths = _numpy(inferred), _numpy(true)
    if guesses.ndim != 2 or truths.ndim != 2 or len(guesses) != len(truths):
        raise ValueError(
            f"categories must be (N, M) and (N, M'), not {guesses.shape} and {truths.shape}"
        )
    return guesses, truths


def _alike(first: ArrayLike, second: ArrayLike, rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
    one, two = _numpy(first), _numpy(second)
    if one.shape != two.shape or one.ndim != rank:
        raise ValueError(f"expected two arrays of rank {rank}, not {one.shape} and {two.shape}")
    return one, two


def _numpy(values: ArrayLike) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
