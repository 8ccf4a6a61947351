"""The models by name. A new model is one file here and one entry in ``MODELS``."""

from __future__ import annotations

import pyro

from pyro_scenes.models.base import GenerativeModel, SceneModel
from pyro_scenes.models.lavae import LAVAE
from pyro_scenes.models.lavae import PRESETS as LAVAE_PRESETS

# Parameters live in their modules: two models never share any, and torch optimisers apply.
pyro.settings.set(module_local_params=True)

# name -> (class, network settings by preset)
MODELS: dict[str, tuple[type[GenerativeModel], dict]] = {"lavae": (LAVAE, LAVAE_PRESETS)}

__all__ = ["MODELS", "GenerativeModel", "SceneModel"]
