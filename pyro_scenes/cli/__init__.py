"""The commands: svi-train, svi-eval, svi-infer and others; bin/ has one file for each.

torch and Pyro are imported inside the commands, so that --help answers at once.
"""

from pyro_scenes.cli.calibrating import calibrate
from pyro_scenes.cli.inferring import infer
from pyro_scenes.cli.making import make_scenes
from pyro_scenes.cli.measuring import bench, evaluate, ship
from pyro_scenes.cli.reporting import report
from pyro_scenes.cli.sweeping import sweep
from pyro_scenes.cli.training import train

__all__ = [
    "bench", "calibrate", "evaluate", "infer", "make_scenes", "report", "ship", "sweep", "train",
]
