"""Held-out figures: importance-weighted likelihood bounds, counts, segmentations."""

from __future__ import annotations

import math
import time

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm import tqdm

from pyro_scenes import metrics
from pyro_scenes.data import SceneData
from pyro_scenes.models import MODELS, GenerativeModel, SceneModel
from pyro_scenes.scene import Scene

BATCH = 256  # images inferred at a time
# Objects in test scenes with more than any training scene has: the paper's test of generalisation.
CROWDED = (7, 7)


@torch.no_grad()
def log_weights(model: GenerativeModel, x: Tensor, particles: int, chunk: int = 1000) -> Tensor:
    """log p(x, z_k) - log q(z_k | x), nats, (K, B), with exact discrete masses on both sides.

    :param x: (B, C, H, W). :param chunk: most particles times images at a time.
    """
    step = max(1, chunk // max(1, len(x)))
    parts = [
        _log_weights(model, x, min(step, particles - start))
        for start in range(0, particles, step)
    ]
    return torch.cat(parts)


def _log_weights(model: GenerativeModel, x: Tensor, particles: int) -> Tensor:
    with pyro.plate("particles", particles, dim=-2):
        guide = poutine.trace(model.guide).get_trace(x)
        joint = poutine.trace(poutine.replay(model.model, trace=guide)).get_trace(x)
    guide.compute_log_prob()
    joint.compute_log_prob()
    total = x.new_zeros(particles, len(x))
    for trace, sign in ((joint, 1.0), (guide, -1.0)):
        for site in trace.nodes.values():
            if site["type"] == "sample" and not site_is_subsample(site):
                total = total + sign * site["log_prob"]
    return total


def iwae(model: GenerativeModel, x: Tensor, particles: int, chunk: int = 1000) -> Tensor:
    """The importance-weighted bound on log p(x), nats per image, (B,) (Burda et al. 2016)."""
    weights = log_weights(model, x, particles, chunk)
    return weights.logsumexp(0) - math.log(particles)


def likelihoods(
    model: GenerativeModel,
    data: SceneData,
    particles: int,
    chunk: int = 1000,
    progress: bool = False,
) -> Tensor:
    """The bound of every image, nats, (N,)."""
    device = next(model.parameters()).device
    size = max(1, chunk // particles)
    bounds = []
    with tqdm(total=len(data), desc="likelihood", unit="image", disable=not progress) as bar:
        for start in range(0, len(data), size):
            x = data.batch(slice(start, start + size)).to(device)
            bounds.append(iwae(model, x, particles, chunk).cpu())
            bar.update(len(x))
    return torch.cat(bounds)


def infer(
    model: SceneModel, data: SceneData, limit: float | None = None
) -> tuple[Scene, Tensor]:
    """The scenes of a whole data set and its segmentation (N, H, W), on the CPU."""
    device = next(model.parameters()).device
    scenes, segmentations = [], []
    for start in range(0, len(data), BATCH):
        scene = model.infer(data.batch(slice(start, start + BATCH)).to(device), limit)
        segmentations.append(model.segment(scene).to(torch.uint8).cpu())
        scenes.append(scene.to("cpu"))
    return Scene.concatenate(scenes), torch.cat(segmentations)


def evaluate(
    model: GenerativeModel,
    data: SceneData,
    *,
    particles: int = 100,
    images: int | None = None,
    nll_images: int | None = None,
    seed: int = 0,
    chunk: int = 1000,
    limit: float | None = None,
    progress: bool = True,
) -> dict:
    """Figures of a model on held-out images, ready for JSON; None where one does not apply.

    nll is the mean of -log p(x) by the bound, in nats per image, over the first nll_images, under
    the likelihood that stands beside it; a Bernoulli one needs binary images. Accuracies are
    fractions; ari is the mean over images with objects. category_correspondence is the paper's,
    without places; placed_correspondence and purity match objects by place first (see `metrics`);
    classes is the number of categories in use.

    :param particles: importance samples an image; 0 to leave the likelihood out.
    :param images: only the first so many. :param nll_images: of those, the likelihood of so many.
    :param limit: most objects in an image.
    :raises UserError: if the images do not suit the model, or one shows too many objects.
    """
    start = time.perf_counter()
    data = data if images is None else data[:images]
    model.check(data.batch(slice(0, 1)))
    result: dict = {
        "model": next((name for name, (kind, *_) in MODELS.items() if type(model) is kind), None),
        "data": data.name,
        "images": len(data),
        "particles": particles,
        "likelihood": model.likelihood.name,
        "nll": None,
        "nll_stderr": None,
        "nll_images": None,
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
    if particles and (data.binary or not model.likelihood.binary):
        with torch.random.fork_rng(), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            nll = -likelihoods(model, data[:nll_images], particles, chunk, progress).double()
        result |= {"nll": float(nll.mean()), "nll_images": len(nll)}
        if len(nll) > 1:
            result["nll_stderr"] = float(nll.std() / math.sqrt(len(nll)))
    result["seconds"] = round(time.perf_counter() - start, 3)
    return result


def _scene_figures(model: SceneModel, data: SceneData, limit: float | None) -> dict:
    scene, segmentation = infer(model, data, limit)
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
    if data.segmentation is not None:
        ari = metrics.foreground_ari(data.segmentation, segmentation.numpy())
        if not all(math.isnan(value) for value in ari):
            figures["ari"] = float(ari[~(ari != ari)].mean())
    return figures


@torch.no_grad()
def look(model: GenerativeModel, data: SceneData) -> dict[str, float]:
    """A quick look during training: the one-sample bound, nats, and the count accuracy."""
    with torch.random.fork_rng(), pyro.validation_enabled(False):
        torch.manual_seed(0)
        figures = {"held-out -ELBO": -float(likelihoods(model, data, 1, BATCH).mean())}
    if isinstance(model, SceneModel) and data.counts is not None:
        counts = infer(model, data, math.inf)[0].counts.numpy()
        figures["count accuracy"] = float(metrics.count_correct(counts, data.counts).mean())
    return figures
