"""Ranks of the truth among a guide's draws, and how often its intervals cover the truth."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from pyro_scenes.plots.curves import CURVE
from pyro_scenes.plots.sheet import DPI, FONT, INK, ArrayLike, as_numpy

BINS = 12
BAND = 0.99
SHADE = "#d9d9d9"
COLOURS = (CURVE, "#c2571a", "#3a7d44", "#8a4f9e", "#7a7a7a")


def calibration_figure(ranks: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Draw histograms of ranks, a row for each guide, and the coverage of its intervals.

    A bar is 1 high where as many ranks fall as of a calibrated guide; those of a row have one
    scale. Grey is where 99% of its bars are, one rank for each scene; the ranks of several numbers
    vary less.

    Args:
        ranks: for each guide, by name, the ranks of each family of sites: (N, Q) from 0 to 1, NaN
            where there is none; of the same families in each.

    Raises:
        ValueError: no ranks, or families that differ.
    """
    names = list(dict.fromkeys(name for row in ranks.values() for name in row))
    if not names or any(list(row) != names for row in ranks.values()):
        raise ValueError("calibration needs ranks, of the same families for each guide")
    across, down = len(names) + 1, len(ranks)
    figure = Figure(figsize=(2.5 * across, 2.4 * down), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    for i, (label, row) in enumerate(ranks.items()):
        covered = figure.add_subplot(down, across, (i + 1) * across)
        first: Axes | None = None
        for j, (name, values) in enumerate(row.items()):
            ranked = as_numpy(values)
            axes = figure.add_subplot(down, across, i * across + j + 1, sharey=first)
            _histogram(axes, ranked)
            size = ranked.shape[1]
            axes.set_title(f"{name}, {size} number{'s' * (size > 1)}", fontsize=FONT, color=INK,
                           parse_math=False)
            _dress(axes, "rank of the truth", "" if first else f"{label}\ndensity; 1 if calibrated")
            axes.tick_params(labelleft=first is None)
            first = first or axes
            _coverage(covered, ranked, COLOURS[j % len(COLOURS)], name)
        covered.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--")
        covered.legend(fontsize=FONT - 2, frameon=False, labelcolor=INK)
        covered.set_title("central intervals", fontsize=FONT, color=INK)
        _dress(covered, "their mass", "truths that they cover")
    return figure


def _histogram(axes: Axes, ranks: NDArray[np.float64]) -> None:
    known = ranks[~np.isnan(ranks)]
    scenes = int((~np.isnan(ranks)).any(1).sum())
    low, high = stats.binom.interval(BAND, max(scenes, 1), 1 / BINS)
    axes.axhspan(low * BINS / max(scenes, 1), high * BINS / max(scenes, 1), color=SHADE, zorder=0)
    axes.axhline(1.0, color=INK, linewidth=0.8, linestyle="--", zorder=1)
    heights, edges = np.histogram(known, BINS, (0.0, 1.0))
    axes.bar(edges[:-1], heights * BINS / max(len(known), 1), 1 / BINS, align="edge", color=CURVE,
             alpha=0.75, edgecolor="white", linewidth=0.6, zorder=2)
    axes.set_xlim(0, 1)


def _coverage(axes: Axes, ranks: NDArray[np.float64], colour: str, name: str) -> None:
    known = ranks[~np.isnan(ranks)]
    if not len(known):
        return
    level = np.linspace(0, 1, 101)
    inside = np.sort(2 * np.abs(known - 0.5))  # the mass of the interval that just covers it
    axes.plot(level, np.searchsorted(inside, level, "right") / len(inside), color=colour,
              linewidth=1.4, label=name)


def _dress(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across, fontsize=FONT, color=INK)
    axes.set_ylabel(up, fontsize=FONT, color=INK)
    axes.tick_params(labelsize=FONT - 1, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
