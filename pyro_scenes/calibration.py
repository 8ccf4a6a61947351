"""Simulation-based calibration: whether a guide is as sure as it may be (Talts et al. 2018).

Scenes are drawn from the model, latents and image, and the guide draws K times from its posterior
of each image. If that is the exact posterior, the latents that the image was made of are one more
draw of it: the rank of each of their numbers among the guide's is uniform. Ranks at both ends
mean that the guide is too sure, ranks in the middle that it is not sure enough, and ranks to one
side that it is off to the other.

Objects have no order, and the guide finds them in one of its own. Ranks are therefore of what does
not depend on it: of the number of objects, and of the object whose centre is farthest to the left,
among the leftmost objects of those draws that have one. Given that a scene has objects, such ranks
are uniform, too. Equal values, as of places on a grid, are put in order by chance.

This asks whether a guide suits its own model. Whether the model suits any data is another question.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from tqdm import tqdm

from pyro_scenes.bounds import CHUNKS
from pyro_scenes.errors import UserError
from pyro_scenes.machine import at_a_time, in_mode, own_parameters, seeded
from pyro_scenes.models import GenerativeModel, SceneModel, base
from pyro_scenes.objectives import Objective

COUNT = "n"
# Of a further training of the guide: images a step, and its learning rate, which falls to 0.
BATCH, RATE = 64, 5e-4
CLIP = 100.0  # largest norm of its gradient
# A step by which all that an objective anneals has come to its end.
END = 720_720_000  # a multiple of every `location_every` up to 16


@dataclass(frozen=True)
class Ranks:
    """What was found in N scenes, on the CPU."""

    # Of each family of sites, or each site of a model without objects, (N, Q) for its Q numbers:
    # the rank of the truth, from 0 to 1; NaN where it has none. "n" is the number of objects, of
    # models that have any.
    values: dict[str, Tensor]
    counts: Tensor | None = None  # (N,) long, of objects
    given: Tensor | None = None  # (N, M + 1), the part of the guide's draws with each count


@torch.no_grad()
def measure(
    model: GenerativeModel,
    scenes: int,
    draws: int = 99,
    seed: int = 0,
    progress: bool = False,
) -> Ranks:
    """Draw scenes from a model, and rank each among the draws of its guide."""
    device = model.device
    size = max(1, at_a_time(CHUNKS[device.type], *model.image_shape[1:]) // draws)
    values: list[dict[str, Tensor]] = []
    counts: list[Tensor] = []
    given: list[Tensor] = []
    with (
        seeded(seed, device), pyro.validation_enabled(False), own_parameters(),
        tqdm(total=scenes, desc="scenes", unit="scene", disable=not progress) as bar,
    ):
        for start in range(0, scenes, size):
            truth, x = simulate(model, min(size, scenes - start))
            with pyro.plate("particles", draws, dim=-2):
                drawn = poutine.trace(model.guide).get_trace(x)
            one, many = numbers(model, truth), numbers(model, drawn)
            absent = torch.full((len(x), 1), math.nan, device=device)
            values.append({
                name: rank(value, many[name]) if name in many else absent.expand_as(value)
                for name, value in one.items()
            })
            if COUNT in one:
                counts.append(one[COUNT][:, 0].long().cpu())
                given.append(many[COUNT][..., 0].long().cpu())  # (K, B)
            bar.update(len(x))
    joined = _joined(values, scenes, size)
    if not counts:
        return Ranks(joined)
    found, true = torch.cat(given, 1), torch.cat(counts)  # (K, N) and (N,)
    most = max(int(found.max()), int(true.max()))
    shares = torch.stack([(found == n).double().mean(0) for n in range(most + 1)], 1)
    return Ranks(joined, true, shares)


@own_parameters()
def simulate(model: GenerativeModel, count: int) -> tuple[poutine.Trace, Tensor]:
    """Scenes from the model: their trace, and images with the likelihood's noise (B, C, H, W)."""
    device = model.device
    dtype = next(model.parameters()).dtype
    blank = torch.zeros(count, *model.image_shape, device=device, dtype=dtype)
    trace = poutine.trace(poutine.uncondition(model.model)).get_trace(blank)
    return trace, trace.nodes["x"]["value"]


def numbers(model: GenerativeModel, trace: poutine.Trace) -> dict[str, Tensor]:
    """What is ranked of a trace of the model or the guide, by family: (..., B, Q)."""
    if not isinstance(model, SceneModel):
        return {
            name: site["value"].flatten(-site["fn"].event_dim) if site["fn"].event_dim
            else site["value"].unsqueeze(-1)
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and name != "x" and not site_is_subsample(site)
        }
    count = model.counts(trace)  # (..., B)
    found = {COUNT: count.unsqueeze(-1).double()}
    families: dict[str, list[Tensor]] = {}
    wanted = (model.where_site, model.appearance_site, "z_cat")
    for name, site in trace.nodes.items():
        family = base.family(name)
        if family in wanted:
            families.setdefault(family, []).append(model.numbers(family, site["value"]))
    if model.where_site not in families:
        return found
    places = torch.stack(families[model.where_site], -2).double()  # (..., B, M, P)
    # Of two in one column, the upper one: y follows x in every model's numbers.
    key = places[..., model.across] + 1e-6 * places[..., model.across + 1]
    slots = torch.arange(key.shape[-1], device=key.device)
    first = key.masked_fill(slots >= count.unsqueeze(-1), math.inf).argmin(-1)  # (..., B)
    for family, parts in families.items():
        values = torch.stack(parts, -2).double()  # (..., B, M, Q)
        index = first[..., None, None].expand(*first.shape, 1, values.shape[-1])
        chosen = values.gather(-2, index).squeeze(-2)
        found[family] = chosen.masked_fill(count.unsqueeze(-1) == 0, math.nan)
    return found


def rank(truth: Tensor, drawn: Tensor) -> Tensor:
    """Ranks from 0 to 1, (B, Q): uniform if the truth is a draw like the others.

    :param truth: (B, Q). :param drawn: (K, B, Q). NaN in either is no value.
    """
    below, same = (compare(drawn, truth).sum(0) for compare in (torch.lt, torch.eq))
    valid = (~drawn.isnan()).sum(0)
    place = (below + (same + 1) * torch.rand_like(truth)) / (valid + 1)
    return place.masked_fill(truth.isnan() | (valid == 0), math.nan)


def _joined(parts: list[dict[str, Tensor]], scenes: int, size: int) -> dict[str, Tensor]:
    """All scenes in one; a family that some parts lack is NaN there."""
    joined = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        width = next(part[name].shape[1] for part in parts if name in part)
        whole = torch.full((scenes, width), math.nan, dtype=torch.double)
        for i, part in enumerate(parts):
            if name in part:
                whole[i * size : i * size + len(part[name])] = part[name].double().cpu()
        joined[name] = whole
    return joined


# --- training the guide --------------------------------------------------------------------------


def train(
    model: GenerativeModel,
    objective: Objective,
    steps: int,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Train the guide further on the model's own scenes, by its objective; the model stays.

    An amortised guide is as good as its training where the images are like those of the training;
    the model's own scenes, which its calibration is about, may be others.

    :param objective: of the model's training, see `objectives`; all that it anneals is at its end.
    :raises UserError: if the loss is not finite.
    """
    device = model.device
    with (
        seeded(seed, device), pyro.validation_enabled(False), in_mode(model, training=True),
        _still(model) as learning,
    ):
        optimizer = torch.optim.Adam(learning, RATE)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        objective.modules.to(device)
        for name, part in model.named_children():  # norms of batches follow what they are shown
            if model.generates(name):
                part.eval()
        with tqdm(total=steps, desc="guide", unit="step", disable=not progress) as bar:
            for _ in range(steps):
                with torch.no_grad():
                    x = simulate(model, BATCH)[1]
                optimizer.zero_grad(set_to_none=True)
                loss, figures = objective.loss(model, x, END)
                if loss.requires_grad:  # not where a guide by point masses finds nothing at all
                    loss.backward()
                    objective.settle(model, len(x))
                norm = nn.utils.clip_grad_norm_(learning, CLIP)
                if not math.isfinite(figures["loss"]) or not norm.isfinite():
                    raise UserError("the loss of the guide's training is not finite")
                optimizer.step()
                fall.step()
                bar.set_postfix(loss=f"{figures['loss']:.4g}")
                bar.update()


@contextmanager
def _still(model: GenerativeModel) -> Iterator[list[nn.Parameter]]:
    """The guide's parameters; those of the generative model take no gradient for a while."""
    fixed = [parameter for parameter in model.generative() if parameter.requires_grad]
    try:
        for parameter in fixed:
            parameter.requires_grad_(False)
        yield [parameter for parameter in model.parameters() if parameter.requires_grad]
    finally:
        for parameter in fixed:
            parameter.requires_grad_(True)


# --- figures -------------------------------------------------------------------------------------

LEVELS = (0.5, 0.9)  # of the central intervals whose coverage is reported
ERROR = 0.01  # how often a calibrated guide's worst distance is beyond the limit


def summary(ranks: Ranks) -> dict[str, Any]:
    """Figures of each family, and of counts, that JSON can hold.

    mean is 0.5 and spread, 12 times the mean square of ranks less 0.5, 1 for a calibrated guide:
    more of one that is too sure or off to one side, as mean shows, less of one that is not sure
    enough. distance is Kolmogorov's, of the number of the family that is worst; a calibrated guide
    exceeds limit in one of a hundred trials. covers has the part of truths inside the guide's
    central intervals of each of LEVELS.

    Of counts: right, how often the guide's likeliest is the true one; sure, the mass that it gives
    to its likeliest; and by count, the number of scenes and the mass that the true count is given.
    """
    families = {}
    for name, values in ranks.values.items():
        columns = [column[~column.isnan()] for column in values.unbind(1)]
        known = torch.cat(columns)
        if not len(known):
            continue
        least = min(len(column) for column in columns)
        families[name] = {
            "numbers": len(columns),
            "scenes": least,
            "mean": float(known.mean()),
            "spread": float(12 * (known - 0.5).square().mean()),
            "distance": max(distance(column) for column in columns),
            "limit": math.sqrt(-0.5 * math.log(ERROR / 2 / len(columns)) / least),
            "covers": {f"{level:.0%}": coverage(known, level) for level in LEVELS},
        }
    result: dict[str, Any] = {"scenes": len(next(iter(ranks.values.values()))), "ranks": families}
    if ranks.counts is not None and ranks.given is not None:
        mass, likeliest = ranks.given.max(1)
        own = ranks.given.gather(1, ranks.counts[:, None]).squeeze(1)
        result["counts"] = {
            "right": float((likeliest == ranks.counts).double().mean()),
            "sure": float(mass.mean()),
            "by count": {
                str(n): {
                    "scenes": int((ranks.counts == n).sum()),
                    "mass": float(own[ranks.counts == n].mean()),
                }
                for n in ranks.counts.unique().tolist()
            },
        }
    return result


def distance(values: Tensor) -> float:
    """The largest distance of the ranks' distribution (N,) from the uniform one, 0 to 1."""
    ordered, steps = values.sort().values, torch.arange(len(values) + 1) / len(values)
    return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max())


def coverage(values: Tensor, level: float) -> float:
    """The part of the truths that lie in the guide's central intervals of a mass."""
    return float(((values - 0.5).abs() <= level / 2).double().mean())
