"""Experiments with priors in one line: from texts to priors for a trained model, fitted if need be.

    with model.priors(**parse(["count=fit", "appearance=flow:4"], model, "multi-dsprites")):
        evaluate(model, data)

What can be written is in `priors.PRIORS`. The rest of the model is left as it is. An appearance
prior is in the ELBO as E_q[log p(z_app)] alone: the one of the highest likelihood on draws of
q(z_app | x) is then the best of its kind, on the scenes that it is fitted to. A fitted count is
the aggregate posterior of n, the mean of q(n | x) over those scenes, see `priors.FittedCount`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm import tqdm

from pyro_scenes import priors
from pyro_scenes.data import DATASETS, SceneData, load, split_held_out
from pyro_scenes.errors import UserError
from pyro_scenes.machine import at_a_time, own_parameters, seeded
from pyro_scenes.models import GenerativeModel, SceneModel, base
from pyro_scenes.models.attend import Attend

ENCODED = 200  # scenes of 64 x 64 at a time
Data = str | Path | SceneData
STEPS, BATCH, RATE = 400, 256, 1e-2  # of the fit: its length, appearances a step, learning rate


def parse(
    texts: Sequence[str],
    model: GenerativeModel,
    data: Data | Callable[[], Data],
    *,
    mnist: Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, nn.Module]:
    """Priors by name, for ``model.priors``.

    :param texts: such as "count=uniform:4-5" and "appearance=mixture:10", one a name.
    :param data: what those that are to be fitted are fitted to, the first images of, as many as it
        takes: scenes, or the training part of a registered data set or a file; or a function of no
        arguments that returns one of these, which is called if anything is to be fitted.
    :raises UserError: for what cannot be read, or does not suit the model.

    >>> from pyro_scenes import checkpoint
    >>> model = checkpoint.load("air-multi-sprites").model
    >>> swapped = parse(["count=uniform:3"], model, "multi-sprites")
    >>> with model.priors(**swapped):
    ...     images, counts = model.draw(4)
    >>> counts.tolist()
    [3, 3, 3, 3]
    """
    # A fit needs gradients, whatever is around it.
    with (
        torch.inference_mode(False), seeded(seed, model.device), pyro.validation_enabled(False)
    ):
        made: dict[str, nn.Module] = {}
        for text in texts:
            name, equals, kind = text.partition("=")
            if not equals:
                raise UserError(f"a prior is NAME=KIND, such as count=uniform:4-5, not {text!r}")
            if name in made:
                raise UserError(f"{text} is a second prior for the {name}: give one")
            made[name] = priors.make(name, kind, _size(model, name)).to(model.device)
        if isinstance(model, Attend) and "count" in made:
            priors.presence_logits(made["count"](), model.steps)  # says so if that cannot be
        unfitted = {k: v for k, v in made.items() if isinstance(v, priors.Fitted)}
        if unfitted:
            if not isinstance(model, SceneModel) or not unfitted.keys() <= {"count", "appearance"}:
                raise UserError(
                    f"{' '.join(texts)}: what is fitted is a prior of the count or appearance of"
                    " objects"
                )
            wanted = max(prior.scenes for prior in unfitted.values())
            found = look(model, _scenes(data, wanted, mnist, texts), progress)
        for name, prior in unfitted.items():
            if name == "count":
                prior.begin(found.counts)
            else:
                fit(prior, found, progress)
    return made


@dataclass(frozen=True)
class Found:
    """What a guide finds in scenes."""

    counts: Tensor  # (N,) long, one draw of q(n | x) for each scene
    means: Tensor  # (P, L), of q(z_app | x), which is normal, for each object of these draws
    scales: Tensor  # (P, L), its standard deviations


@torch.no_grad()
@own_parameters()
def look(model: SceneModel, scenes: SceneData, progress: bool = True) -> Found:
    """Draw from the guide once for each scene."""
    counts, means, scales = [], [], []
    size = at_a_time(ENCODED, *scenes.shape[:2])
    with tqdm(total=len(scenes), desc="scenes", unit="image", disable=not progress) as bar:
        for start in range(0, len(scenes), size):
            x = scenes.batch(slice(start, start + size)).to(model.device)
            trace = poutine.trace(model.guide).get_trace(x)
            counts.append(model.counts(trace))
            for name, site in trace.nodes.items():
                if base.family(name) == model.appearance_site:
                    here = site["mask"]  # (B,), where there is such an object; else in all images
                    if not isinstance(here, Tensor):
                        here = torch.ones(site["fn"].batch_shape, dtype=torch.bool)
                    means.append(site["fn"].mean[here])
                    scales.append(site["fn"].variance.sqrt()[here])
            bar.update(len(x))
    nothing = torch.zeros(0, 0, device=model.device)
    return Found(
        torch.cat(counts), torch.cat(means or [nothing]), torch.cat(scales or [nothing])
    )


@torch.enable_grad()
def fit(prior: priors.Fitted, found: Found, progress: bool = True) -> None:
    """Fit p(z_app) by maximum likelihood on draws of q(z_app | x), or on what they are in the mean.

    :raises UserError: if there are no objects.
    """
    means, scales = found.means, found.scales
    if not len(means):
        raise UserError("no object was found in the scenes that an appearance prior is fitted to")
    prior.begin(means, scales)
    if not prior.climbs:
        return
    optimizer = torch.optim.Adam(prior.parameters(), RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in tqdm(range(STEPS), desc="prior", unit="step", disable=not progress):
        row = torch.randint(len(means), (BATCH,), device=means.device)
        z = means[row] + scales[row] * torch.randn_like(scales[row])
        loss = -prior().log_prob(z).mean()  # nats an object
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


def _size(model: GenerativeModel, name: str) -> int:
    """What `priors.make` is to know of a model: its largest count, or dimensions of appearance."""
    if name not in priors.PRIORS:
        return 0  # which `priors.make` has a line for
    own = model.prior(name)()
    if name == "count":
        return own.logits.shape[-1] - 1
    if not own.event_shape[0]:
        raise UserError(f"the objects of this {type(model).__name__} have no {name}")
    return own.event_shape[0]


def _scenes(
    data: Data | Callable[[], Data], wanted: int, mnist: Path | None, texts: Sequence[str]
) -> SceneData:
    try:
        if callable(data):
            data = data()
        if isinstance(data, SceneData):
            return data[:wanted]
        if str(data) in DATASETS:
            return load(data, split="train", images=wanted, mnist=mnist)
        return split_held_out(load(data))[0][:wanted]
    except UserError as error:
        raise UserError(f"{' '.join(texts)}, fitted to scenes of the training: {error}") from None
