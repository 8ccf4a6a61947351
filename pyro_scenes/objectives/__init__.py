"""What a training minimises, and everything that is annealed: from outside, never in a model.

An objective gives the loss of a batch by way of a Pyro ELBO, see `Objective`. It owns what it
needs besides the model (LAVAE's auxiliary VAE, Discrete-AIR's rescue), says the learning rates of
each step, and leaves the model at the end of each step as it would be evaluated.
"""

from collections.abc import Callable
from typing import Any

from pyro_scenes.objectives.air import (
    AIR_PRESETS,
    DISCRETE_PRESETS,
    AIRObjective,
    DiscreteAIRObjective,
)
from pyro_scenes.objectives.base import Objective, Schedule, temporarily
from pyro_scenes.objectives.conv_vae import PRESETS as CONV_VAE_PRESETS
from pyro_scenes.objectives.conv_vae import ConvVAEObjective
from pyro_scenes.objectives.lavae import PRESETS, LAVAEObjective

# model name -> (objective class, schedule by preset; of one without, its defaults)
OBJECTIVES: dict[str, tuple[Callable[..., Objective], dict[str, Any]]] = {
    "lavae": (LAVAEObjective, PRESETS),
    "discrete-air": (DiscreteAIRObjective, DISCRETE_PRESETS),
    "air": (AIRObjective, AIR_PRESETS),
    "conv-vae": (ConvVAEObjective, CONV_VAE_PRESETS),
}


def objective(model: str) -> Callable[..., Objective]:
    """What makes the objective of a model by name, from a schedule, the model and the steps."""
    return OBJECTIVES[model][0] if model in OBJECTIVES else Objective


def schedule(model: str, preset: str) -> Any:
    """The settings of that objective, a dataclass."""
    if model not in OBJECTIVES:
        return Schedule()
    known = OBJECTIVES[model][1]
    return known[preset] if preset in known else type(next(iter(known.values())))()


__all__ = ["OBJECTIVES", "Objective", "Schedule", "objective", "schedule", "temporarily"]
