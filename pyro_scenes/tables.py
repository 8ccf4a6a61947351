"""Figures as text: numbers, means over seeds, bounds with their errors, and Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def lines(
    headings: Sequence[str], rows: Sequence[Sequence[str]], keep: int | None = None
) -> list[str]:
    """The lines of a Markdown table.

    :param keep: leave columns that apply to no row out, but for the first so many; None: keep all.
    """
    used = [i for i in range(len(headings))
            if keep is None or i < keep or any(row[i] != "-" for row in rows)]
    cells = (headings, ["---"] * len(headings), *rows)
    return ["| " + " | ".join(row[i] for i in used) + " |" for row in cells]


def number(value: float | None, digits: int) -> str:
    """A figure to print; "-" for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def known(figures: list[dict], key: str) -> list[float]:
    """One figure of each seed, of those that have it."""
    return [figure[key] for figure in figures if figure.get(key) is not None]


def spread(figures: list[dict], key: str, digits: int) -> str:
    """Mean +- standard deviation over seeds."""
    values = known(figures, key)
    if not values:
        return "-"
    mean = number(statistics.mean(values), digits)
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def bound(figures: list[dict], digits: int = 1) -> str:
    """The bound on -log p(x) over seeds, nats, with the likelihood it is under."""
    text = spread(figures, "nll", digits)
    return text if text == "-" else f"{text} ({figures[0]['likelihood']})"


def images_error(figures: list[dict]) -> str:
    """The standard error over images of that bound, nats, of a seed, and of how many images."""
    errors = known(figures, "nll_stderr")
    if not errors:
        return "-"
    return f"{statistics.mean(errors):.1f} of {figures[0]['nll_images']:,}"
