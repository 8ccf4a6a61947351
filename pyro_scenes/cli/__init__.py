"""The commands: svi-train, svi-eval, svi-infer, svi-report, svi-bench, svi-ship and make-scenes.

torch and Pyro are imported inside the commands, so that --help answers at once.
"""

from pyro_scenes.cli.inferring import infer
from pyro_scenes.cli.making import make_scenes
from pyro_scenes.cli.measuring import bench, evaluate, ship
from pyro_scenes.cli.reporting import report
from pyro_scenes.cli.training import train

__all__ = ["bench", "evaluate", "infer", "make_scenes", "report", "ship", "train"]
