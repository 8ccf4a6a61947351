"""Figures of merit for inferred scenes: counts, categories and segmentations.

Each function takes numpy arrays or torch tensors, a batch at a time, and returns one figure per
image where the figure has one; means are left to the caller. All are fractions, never per cent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ArrayLike = NDArray[Any] | Tensor


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
    rows, row = np.unique(truths, return_inverse=True)
    columns, column = np.unique(guesses, return_inverse=True)
    table = np.zeros((len(rows), len(columns)), dtype=np.int64)
    np.add.at(table, (row, column), 1)
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
    guesses, truths = _numpy(inferred), _numpy(true)
    if guesses.ndim != 2 or truths.ndim != 2 or len(guesses) != len(truths):
        raise ValueError(
            f"categories must be (N, M) and (N, M'), not {guesses.shape} and {truths.shape}"
        )
    labels = int((truths >= 0).sum())
    if not labels:
        return None
    guessed, present = _occurrences(guesses), _occurrences(truths)
    # (K, T): labels t found in the whole data set if category k is renamed t.
    found = np.array([np.minimum(one, present).sum(1) for one in guessed])
    if not found.size:
        return 0.0
    return float(found[linear_sum_assignment(found, maximize=True)].sum() / labels)


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
    rows, row = np.unique(true, return_inverse=True)
    columns, column = np.unique(inferred, return_inverse=True)
    table = np.bincount(row * len(columns) + column, minlength=len(rows) * len(columns))
    table = table.reshape(len(rows), len(columns))
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


def _alike(first: ArrayLike, second: ArrayLike, rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
    one, two = _numpy(first), _numpy(second)
    if one.shape != two.shape or one.ndim != rank:
        raise ValueError(f"expected two arrays of rank {rank}, not {one.shape} and {two.shape}")
    return one, two


def _numpy(values: ArrayLike) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
