"""Curves of a training, of a bound as particles are added, and of costs as problems grow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from pyro_scenes.plots.sheet import DPI, FONT, INK

CURVE = "#1f5fa8"
SHADES = colormaps["Blues"]


def training_curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Plot scalars against training steps, one panel for each.

    Values that are not finite leave a gap. Long series are drawn pale under their running mean.
    A series of positive values that spans more than a factor of 20 gets a logarithmic axis.

    Args:
        series: for each name, (steps, values) of one length, in the order of the steps.

    Raises:
        ValueError: no series, or steps and values that differ in length.
    """
    if not series:
        raise ValueError("training curves need at least one series")
    across = min(3, len(series))
    down = math.ceil(len(series) / across)
    figure = Figure(figsize=(3.2 * across, 2.3 * down), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    for i, (name, (steps, values)) in enumerate(series.items()):
        x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
        if x.ndim != 1 or x.shape != y.shape:
            raise ValueError(f"{name}: {x.shape} steps for {y.shape} values")
        axes = figure.add_subplot(down, across, i + 1)
        _draw_curve(axes, x, y)
        # As it is: a stranger's checkpoint may hold names that are no formulae.
        axes.set_title(name, fontsize=FONT + 1, color=INK, parse_math=False)
        _dress(axes, "step")
    return figure


def bound_figure(curve: Sequence[Mapping[str, Any]], entropy: float | None = None) -> Figure:
    """Plot the bound on -log p(x) against the number of particles, with its standard errors.

    Args:
        curve: "particles", "nll" and "nll_stderr" (None where unknown) of each point, in the order
            of the particles; as `evaluate` has it under "curve".
        entropy: of the data, nats per image: a line that no Bernoulli model goes below but by
            chance.

    Raises:
        ValueError: no point.
    """
    if not curve:
        raise ValueError("a curve needs at least one point")
    figure = Figure(figsize=(4.2, 3.0), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    particles = [point["particles"] for point in curve]
    axes.errorbar(
        particles, [point["nll"] for point in curve],
        yerr=[point["nll_stderr"] or 0.0 for point in curve],
        color=CURVE, linewidth=1.4, marker="o", markersize=3.5, capsize=3, elinewidth=0.9,
        label="bound; bars are standard errors over images",
    )
    if entropy is not None:
        axes.axhline(entropy, color=INK, linewidth=0.9, linestyle="--", label="entropy of the data")
    axes.set_xscale("log")
    axes.set_xticks(particles, [f"{number:,}" for number in particles])
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside upper center", fontsize=FONT - 1, frameon=False, labelcolor=INK)
    axes.set_ylabel("-log p(x) <=, nats per image", fontsize=FONT, color=INK)
    _dress(axes, "particles")
    return figure


def growth_figure(growth: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot what an image costs against the number of objects, for each canvas.

    Args:
        growth: "side" (pixels), "objects" and "seconds_per_image" ("median", "min", "max") of each
            point; as `svi-bench` has it under "growth", of one batch size.

    Raises:
        ValueError: no point.
    """
    if not growth:
        raise ValueError("a plot of costs needs at least one point")
    figure = Figure(figsize=(4.6, 3.2), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sides = sorted({point["side"] for point in growth})
    for i, side in enumerate(sides):
        points = [point for point in growth if point["side"] == side]
        costs = [[1000 * point["seconds_per_image"][k] for point in points]
                 for k in ("median", "min", "max")]
        objects = [point["objects"] for point in points]
        shade = SHADES(0.25 + 0.6 * i / max(len(sides) - 1, 1))
        axes.fill_between(objects, costs[1], costs[2], color=shade, alpha=0.2, linewidth=0)
        axes.plot(objects, costs[0], color=shade, linewidth=1.4, marker="o", markersize=3.5,
                  label=f"{side} x {side} pixels")
    axes.set_ylim(bottom=0.0)
    figure.legend(loc="outside upper center", ncols=len(sides), fontsize=FONT - 1, frameon=False,
                  labelcolor=INK)
    axes.set_ylabel("a training step, ms an image", fontsize=FONT, color=INK)
    _dress(axes, "objects in the image")
    return figure


def _dress(axes: Axes, across: str) -> None:
    axes.set_xlabel(across, fontsize=FONT, color=INK)
    axes.tick_params(which="both", labelsize=FONT - 1, colors=INK)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: Axes, x: NDArray[Any], y: NDArray[Any]) -> None:
    finite = np.isfinite(y)
    known = y[finite]
    window = len(known) // 40
    if window > 4:
        axes.plot(x, y, color=CURVE, alpha=0.3, linewidth=0.6)
        ones = np.ones(window)
        # Divided by the number of values under the window, so that the ends do not sag.
        mean = np.convolve(known, ones, "same") / np.convolve(np.ones_like(known), ones, "same")
        axes.plot(x[finite], mean, color=CURVE, linewidth=1.4)
    else:
        axes.plot(x, y, color=CURVE, linewidth=1.4, marker="o", markersize=2.5)
    if len(known) and known.min() > 0 and known.max() > 20 * known.min():
        axes.set_yscale("log")
        if known.max() < 1000 * known.min():
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(
        MaxNLocator(4, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])
    )
