"""Models late in their training, without having been trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_scenes.bench import plain
from pyro_scenes.config import TrainConfig, make_config
from pyro_scenes.data import SceneData
from pyro_scenes.models.lavae import LAVAE
from pyro_scenes.objectives.base import Objective, temporarily
from pyro_scenes.objectives.lavae import LAVAEObjective
from pyro_scenes.training import OPTIMIZERS

DATA = "multi-dsprites"


class Late:
    """A model, its optimiser and one batch (B, C, H, W), in the last step of its training."""

    def __init__(self, train: TrainConfig, model: Any, objective: Objective, x: Tensor):
        self.train, self.model, self.objective, self.x = train, model, objective, x
        rates = objective.learning_rates(train.steps - 1)
        groups = [{"params": p, "lr": rates[name]} for name, p in model.groups().items()]
        options: dict[str, Any] = {"betas": (0.9, train.beta2)}
        self.optimizer = OPTIMIZERS[train.optimizer](groups, **options)

    def backward(self) -> None:
        self.objective.backward(self.model, self.x, self.train.steps - 1)

    def step(self) -> None:
        """As `training.Run.advance` does the last one."""
        self.optimizer.zero_grad(set_to_none=True)
        self.backward()
        if self.train.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip)
        self.optimizer.step()


class Told(nn.Module):
    """A location network that finds the objects untrained: peaks are added to its heights.

    What a step costs depends on how many objects are found, and a bound on how far apart its
    particles are. The network's own heights are lowered, so that none of them counts.

    :param peaks: (N, H, W), for the images that it will be given, or the first of them.
    """

    def __init__(self, net: nn.Module, peaks: Tensor):
        super().__init__()
        self.net, self.stride = net, net.stride
        self.peaks = nn.Buffer(peaks)

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * self.net(x) + self.peaks[: len(x)]


def peaks(data: SceneData, height: float) -> Tensor:
    """One pixel of that height at the centre of each object's box, (N, H, W)."""
    assert data.boxes is not None
    maps = torch.zeros(len(data), *data.shape[:2])
    boxes = torch.from_numpy(data.boxes)  # (N, M, 4)
    image, slot = (~boxes[..., 0].isnan()).nonzero(as_tuple=True)
    column, row = boxes[image, slot, :2].long().unbind(-1)
    maps[image, row, column] = height
    return maps


class Trainer(Late):
    """LAVAE so late.

    :param by_hand: take the ELBO of `plain.py` in place of the training's own objective.
    """

    def __init__(
        self, preset: str, data: SceneData, device: torch.device, bfloat16=False, by_hand=False,
        settings: Sequence[str] = (),
    ):
        config = make_config("lavae", DATA, preset, settings)
        # No image is forced to one object, as the paper does at random: a step costs what it shows.
        # All networks learn from the bound, which is what a step by hand is compared in, and all of
        # its divergence is by the draw, as there.
        schedule = replace(
            config.schedule, one_object_left=0.0, location_every=1, dreams=0,
            exact_divergence=False,
        )
        torch.manual_seed(config.seed)
        self.bfloat16, self.by_hand = bfloat16, by_hand
        self.model = LAVAE(config.net, (3, *data.shape[:2]))
        # A peak that a trained network could make, sure to be counted and all but sure to be drawn.
        told = peaks(data, config.net.count_threshold + 3.0)
        self.model.location_net = Told(self.model.location_net, told)
        self.model.to(device).train()
        self.model.temperature = schedule.temperature_end
        objective = LAVAEObjective(schedule, self.model, config.train.steps)
        super().__init__(config.train, self.model, objective, data.batch().to(device))

    def backward(self) -> None:
        with temporarily(self.model, autocast=self.bfloat16):
            if self.by_hand:
                encoded = self.model.encode(self.x)
                noise = plain.fresh_noise(self.model, encoded)
                (-plain.elbo(self.model, self.x, encoded, noise).mean()).backward()
            else:
                super().backward()
