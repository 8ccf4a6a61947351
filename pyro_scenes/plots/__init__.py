"""Figures of scenes, of training and of bounds, after those of the LAVAE and Discrete-AIR papers.

Functions take images as torch tensors or numpy arrays of floats in [0, 1] (values outside are
clipped), channels first, with 1 or 3 channels, and return a `matplotlib.figure.Figure`; images of
another rank, type or number of channels raise ValueError. pyplot is never touched, so that nothing
is shared between figures, threads or notebooks. `save` writes figures to files; `pixels` gives
them as arrays.

Figures are laid out in whole screen pixels, and an image pixel covers a whole number of them
(unless the image is very large): images stay crisp, and a mark one pixel wide stays visible.
"""

from pyro_scenes.plots.calibration import calibration_figure
from pyro_scenes.plots.curves import bound_figure, growth_figure, training_curves
from pyro_scenes.plots.grids import samples_figure, swap_figure, traversal_figure
from pyro_scenes.plots.pairs import pairs_figure
from pyro_scenes.plots.scenes import PALETTE, inference_figure
from pyro_scenes.plots.sheet import FORMATS, pixels, save
from pyro_scenes.plots.tables import Table, tables_figure

__all__ = [
    "FORMATS",
    "PALETTE",
    "Table",
    "bound_figure",
    "calibration_figure",
    "growth_figure",
    "inference_figure",
    "pairs_figure",
    "pixels",
    "samples_figure",
    "save",
    "swap_figure",
    "tables_figure",
    "training_curves",
    "traversal_figure",
]
