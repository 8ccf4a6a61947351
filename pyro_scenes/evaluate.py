"""Held-out figures: likelihood bounds, counts, categories, segmentations."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_scenes import bounds, distributed, metrics
from pyro_scenes.data import SceneData, entropy_of
from pyro_scenes.errors import UserError
from pyro_scenes.machine import at_a_time, in_mode, seeded
from pyro_scenes.models import MODELS, GenerativeModel, SceneModel
from pyro_scenes.scene import Scene

BATCH = 256  # images of 64 x 64 inferred at a time
# What an object must add to a pixel to be its owner, of 1. Little: the index asks whose a pixel of
# the foreground is, and thin strokes that a model is not sure of have low means.
FAINT = 0.02


def infer(
    model: SceneModel, data: SceneData, limit: float | None = None, segment: bool = False
) -> tuple[Scene, Tensor | None]:
    """The scenes of a whole data set and, if asked for, its segmentation (N, H, W), on the CPU.

    :raises UserError: if there are no images, or one shows more objects than the limit.
    """
    device = model.device
    if not len(data):
        raise UserError("there are no images to find objects in: give at least 1")

    def inferred(part: slice) -> tuple[Scene, Tensor | None]:
        scene = model.infer(data.batch(part).to(device), limit)
        owners = model.segment(scene, FAINT).to(torch.int16).cpu() if segment else None
        return scene.to("cpu"), owners

    with in_mode(model, training=False):
        scenes, owners = zip(*distributed.mapped(inferred, batches(data)), strict=True)
    return Scene.concatenate(list(scenes)), torch.cat(owners) if segment else None


def batches(data: SceneData) -> list[slice]:
    """Parts of a data set that are small enough to be inferred at once, whatever its images' size.
    """
    size = at_a_time(BATCH, *data.shape[:2])
    return [slice(start, start + size) for start in range(0, len(data), size)]


def evaluate(
    model: GenerativeModel,
    data: SceneData,
    *,
    particles: int = 100,
    nll_images: int | None = None,
    seed: int = 0,
    chunk: int | None = None,
    chunk_seeds: bool = False,
    limit: float | None = None,
    priors: Sequence[str] = (),
    progress: bool = True,
) -> dict:
    """Figures of a model on held-out images, ready for JSON; None where one does not apply.

    nll is the mean of -log p(x) by the bound, in nats per image, over the first nll_images, under
    the likelihood that stands beside it; a Bernoulli one needs binary images. curve has the same at
    K = 1, 10, 100 ... particles, from the samples of one pass; ess the effective sample size of all
    particles, from 1 to their number: its mean and median over images, and what a tenth of them do
    not exceed; split the parts of nll at K = 1 (see `bounds`). entropy is the limit of nll and its
    parts, for generated binary images (see `data.entropy`). Accuracies are fractions; ari is the
    mean over images with objects. category_correspondence is the paper's, without places;
    placed_correspondence and purity match objects by place first (see `metrics`); classes is the
    number of categories in use.

    Under a prior that is swapped in, an image may have a count without mass: impossible has the
    number of such images, by all particles, and what is then infinite is None.

    :param particles: importance samples an image; 0 to leave the likelihood out.
    :param nll_images: the likelihood of the first so many. :param seed: of the samples.
    :param chunk: particles times images at a time; by default what suits device and image size.
    :param chunk_seeds: seed the samples of each chunk anew, as several processes always do.
    :param limit: most objects in an image.
    :param priors: what is swapped into the model, in words, for the result to say so.
    :param progress: show a bar.
    :raises UserError: if there are no images, or they do not suit the model, or one shows too many
        objects.
    """
    start = time.perf_counter()
    if not len(data) or nll_images == 0:
        raise UserError("there are no images to measure the model on: ask for at least 1")
    model.check(data.batch(slice(0, 1)))
    result: dict = {
        "model": next((name for name, (kind, *_) in MODELS.items() if type(model) is kind), None),
        "data": data.name,
        "images": len(data),
        "particles": particles,
        "likelihood": model.likelihood.name,
        "priors": list(priors),
        "nll": None,
        "nll_stderr": None,
        "nll_images": None,
        "impossible": None,
        "curve": None,
        "ess": None,
        "split": None,
        "entropy": None,
        "count_accuracy": None,
        "count_confusion": None,
        "category_correspondence": None,
        "placed_correspondence": None,
        "purity": None,
        "classes": None,
        "ari": None,
        "seed": seed,
    }
    if isinstance(model, SceneModel):
        result |= _scene_figures(model, data, limit)
    if particles and bounds.applies(model, data):
        with seeded(seed, model.device), pyro.validation_enabled(False):
            each = seed if chunk_seeds or distributed.world() > 1 else None
            found = bounds.measure(model, data[:nll_images], particles, chunk, progress, each)
        result |= _likelihood_figures(found)
    result["seconds"] = round(time.perf_counter() - start, 3)
    if result["nll"] is not None and model.likelihood.binary:  # else a density, without that limit
        result["entropy"] = entropy_of(data)
    return result


def _likelihood_figures(found: bounds.Estimate) -> dict:
    images = found.bounds.shape[1]
    nats = found.bounds.masked_fill(found.bounds < -bounds.IMPOSSIBLE, -math.inf)
    curve = [
        {
            "particles": size,
            "nll": _finite(-bound.mean()),
            "nll_stderr": _finite(bound.std() / math.sqrt(images)) if images > 1 else None,
        }
        for size, bound in zip(found.particles, nats, strict=True)
    ]
    median, decile = found.effective.quantile(found.effective.new_tensor([0.5, 0.1])).tolist()
    return {
        "nll": curve[-1]["nll"],
        "nll_stderr": curve[-1]["nll_stderr"],
        "nll_images": images,
        "impossible": int(nats[-1].isinf().sum()),
        "curve": curve,
        "ess": {"mean": float(found.effective.mean()), "median": median, "decile": decile},
        "split": {name: _finite(part.mean()) for name, part in found.split.items()},
    }


def _finite(value: Tensor) -> float | None:
    """None of what is infinite, or the spread of that: JSON has no infinity."""
    return float(value) if value.abs() < bounds.IMPOSSIBLE else None


def _scene_figures(model: SceneModel, data: SceneData, limit: float | None) -> dict:
    scene, segmentation = infer(model, data, limit, segment=data.segmentation is not None)
    figures: dict = {}
    if data.counts is not None:
        counts = scene.counts.numpy()
        figures["count_accuracy"] = float(metrics.count_correct(counts, data.counts).mean())
        figures["count_confusion"] = metrics.count_confusion(counts, data.counts)
    if scene.kind is not None:
        kind, labels = scene.kind.numpy(), data.categories
        figures["classes"] = metrics.classes_in_use(kind)
        if labels is not None:
            figures["category_correspondence"] = metrics.category_correspondence(kind, labels)
        if labels is not None and data.boxes is not None:
            matches = metrics.match_by_place(scene.boxes.numpy(), data.boxes)
            figures["placed_correspondence"] = metrics.placed_correspondence(kind, labels, matches)
            figures["purity"] = metrics.purity(kind, labels, matches)
    if data.segmentation is not None and segmentation is not None:
        ari = metrics.foreground_ari(data.segmentation, segmentation.numpy())
        known = ari[~np.isnan(ari)]
        if len(known):
            figures["ari"] = float(known.mean())
    return figures


@torch.no_grad()
def look(model: GenerativeModel, data: SceneData) -> dict[str, float]:
    """A quick look during training: the one-sample bound, nats, and the count accuracy."""
    with seeded(0, model.device), pyro.validation_enabled(False):
        each = 0 if distributed.world() > 1 else None
        found = bounds.measure(model, data, 1, at_a_time(BATCH, *data.shape[:2]), seed=each)
        figures = {"held-out -ELBO": -float(found.bounds.mean())}
    if isinstance(model, SceneModel) and data.counts is not None:
        counts = infer(model, data, math.inf)[0].counts.numpy()
        figures["count accuracy"] = float(metrics.count_correct(counts, data.counts).mean())
    return figures
