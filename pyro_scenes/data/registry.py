"""The data sets by name, and the one way to get data: a name or a file in, SceneData out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pyro_scenes.data import multi_dsprites, multi_mnist, multi_sprites
from pyro_scenes.data.generator import DatasetSpec
from pyro_scenes.data.npz import load_npz
from pyro_scenes.data.png import load_pngs
from pyro_scenes.data.scene_data import SceneData
from pyro_scenes.errors import UserError

DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        multi_dsprites.SPEC, multi_mnist.SPEC_1K, multi_mnist.SPEC_10K,
        multi_sprites.SPEC, multi_sprites.SPEC_SMALL, multi_mnist.SPEC_GREY,
        multi_mnist.SPEC_NEW_DIGITS,
    )
}


def dataset(name: str) -> DatasetSpec:
    """A data set by name. Raises UserError for an unknown one, or with others that are unknown."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r:.60}; one of {', '.join(DATASETS)}")
    spec = DATASETS[name]
    for other in spec.others.values():
        if other not in DATASETS:
            raise UserError(f"models of {name} are measured on {other!r:.60} too, which is no data"
                            " set: register it, or leave it out of the others")
    return spec


def make(
    name: str, images: int, *, objects: tuple[int, int] | None = None, seed: int = 0,
    stream: str = "test", mnist: str | Path | None = None, segmentation: bool = True,
) -> SceneData:
    """Generate `images` scenes of a registered data set.

    The same arguments give the same bytes on every machine, and a longer data set begins with
    the images of a shorter one. Streams ("train", "test") and object ranges share no random
    numbers.

    Args:
        objects: fewest and most objects a scene, both included, each count equally likely;
            None is the data set's own range, 0 to 3 or 0 to 2.
        mnist: the folder with MNIST's files, for the data sets made from it; see `mnist.py`.

    Raises:
        UserError: an unknown name or stream, a range that is empty or does not fit, no MNIST.
    """
    return dataset(name).generate(
        images, objects=objects, seed=seed, stream=stream, segmentation=segmentation,
        mnist=None if mnist is None else Path(mnist))


def load(
    source: str | Path, *, split: str = "test", images: int | None = None,
    objects: tuple[int, int] | None = None, mnist: str | Path | None = None,
    segmentation: bool | None = None, channels: int | None = None,
) -> SceneData:
    """Data by name or from a file.

    Args:
        source: a registered name (generated with seed 0 from that split's stream, in that
            split's size), or the path of an npz file or of a folder of PNG files, which serves
            either split as it is.
        split: "train" or "test".
        images: take only the first so many.
        objects: as for `make`; generated data only.
        segmentation: generate segmentation maps; None does for "test" only, they take memory.
            A file's map is always kept.
        channels: of a folder of PNG files, 1 or 3; None for 1 where all are grey.

    Raises:
        UserError: neither a known name nor a readable npz file, or as for `make`.
    """
    if images is not None and images < 1:
        raise UserError(f"{images} images asked for; ask for at least 1")
    if str(source) in DATASETS:
        spec = DATASETS[str(source)]
        if split not in spec.sizes:
            raise UserError(f"unknown split {split!r}; one of {', '.join(spec.sizes)}")
        return make(
            str(source), images or spec.sizes[split], objects=objects, stream=split, mnist=mnist,
            segmentation=split == "test" if segmentation is None else segmentation)
    if not Path(source).exists():
        raise UserError(f"no data set and no file is called {str(source)!r}; give an npz file, a "
                        f"folder of PNG files or one of {', '.join(DATASETS)}")
    if objects is not None:
        raise UserError(f"{source} is a file: the number of objects can only be chosen for "
                        f"{', '.join(DATASETS)}")
    if Path(source).is_dir():
        pixels = load_pngs([source], channels or 3)
        if channels is None and (pixels == pixels[..., :1]).all():
            pixels = np.ascontiguousarray(pixels[..., :1])
        return SceneData.from_images(Path(source).resolve().name, pixels)[:images]
    return load_npz(source)[:images]
