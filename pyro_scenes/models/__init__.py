"""The models by name. A new model is one file here and one entry in ``MODELS``."""

from __future__ import annotations

from collections.abc import Callable

from pyro_scenes.models import air, conv_vae, discrete_air, lavae
from pyro_scenes.models.base import GenerativeModel, SceneModel

# name -> (class, network settings by preset, what differs by preset and data set)
MODELS: dict[str, tuple[Callable[..., GenerativeModel], dict, dict]] = {
    "lavae": (lavae.LAVAE, lavae.PRESETS, lavae.SUITED),
    "discrete-air": (discrete_air.DiscreteAIR, discrete_air.PRESETS, discrete_air.SUITED),
    "air": (air.AIR, air.PRESETS, air.SUITED),
    "conv-vae": (conv_vae.ConvVAE, conv_vae.PRESETS, conv_vae.SUITED),
}

__all__ = ["MODELS", "GenerativeModel", "SceneModel"]
