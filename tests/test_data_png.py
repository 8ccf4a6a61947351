"""Images for inference from PNG files."""

import numpy as np
import pytest
from PIL import Image

from pyro_scenes.data import load, load_pngs
from pyro_scenes.errors import UserError

GREY = np.arange(20, dtype=np.uint8).reshape(4, 5) * 12
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], -1)


def save(path, array, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)
    return path


def test_colour_and_grey_in_the_order_of_names(tmp_path):
    save(tmp_path / "b.png", COLOUR)
    save(tmp_path / "a.PNG", GREY)
    (tmp_path / "notes.txt").write_text("no image")
    images = load_pngs([tmp_path], 3)
    assert images.dtype == np.uint8 and images.shape == (2, 4, 5, 3)
    assert np.array_equal(images[0], np.repeat(GREY[..., None], 3, -1))
    assert np.array_equal(images[1], COLOUR)
    files = load_pngs([tmp_path / "b.png", tmp_path / "a.PNG"], 3)
    assert np.array_equal(files, images[::-1])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L"])
def test_grey_wanted(tmp_path, mode):
    images = load_pngs([save(tmp_path / "a.png", GREY, mode)], 1)
    assert np.array_equal(images[0, ..., 0], GREY)


def test_two_colours_and_palette(tmp_path):
    bits = np.where(GREY > 100, 255, 0).astype(np.uint8)
    for mode in ("1", "P"):
        images = load_pngs([save(tmp_path / "a.png", bits, mode)], 3)
        assert np.array_equal(images[0, ..., 1], bits)


def test_refusals_are_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    whole = save(tmp_path / "whole.png", np.zeros((64, 64, 3), np.uint8) + COLOUR[0, 0])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cut = save(tmp_path / "cut.png", noise)
    cut.write_bytes(cut.read_bytes()[:3000])
    save(tmp_path / "deep.png", np.zeros((64, 64), np.uint16))
    save(tmp_path / "photo.jpg", noise)
    for paths, message in [
        ([], "no images given"),
        (["missing.png"], "does not exist"),
        (["empty"], "no PNG files"),
        (["text.png"], "is no PNG file"),
        (["photo.jpg"], "is no PNG file"),
        (["cut.png"], "cannot be read"),
        (["deep.png"], "8 bits"),
        (["whole.png", "missing.npz"], "does not exist"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_pngs([tmp_path / path for path in paths], 3)
        assert "\n" not in str(error.value)
    wide = save(tmp_path / "wide.png", np.zeros((32, 48, 3), np.uint8))
    with pytest.raises(UserError, match="wide.png is 32 x 48 and .*whole.png is 64 x 64 pixels"):
        load_pngs([whole, wide], 3)


def test_a_folder_is_data(tmp_path):
    """In order of name; grey where no pixel has a colour."""
    pixels = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
    for name, image in zip("ba", pixels, strict=True):
        save(tmp_path / f"{name}.png", image)
    found = load(tmp_path)
    assert (found.name, found.shape, len(found)) == (tmp_path.name, (8, 8, 1), 2)
    assert (found.images()[..., 0] == pixels[::-1]).all()
    assert (load(tmp_path, images=1).images()[0, ..., 0] == pixels[1]).all()
    save(tmp_path / "c.png", np.zeros((8, 8, 3), np.uint8) + np.array([9, 9, 8], np.uint8))
    coloured = load(tmp_path)
    assert coloured.shape == (8, 8, 3) and coloured.images()[2, 0, 0].tolist() == [9, 9, 8]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_black(tmp_path, mode):
    grey = np.array([[200, 200, 100]], np.uint8)
    image = Image.fromarray(grey, "L").convert("L" if mode == "LA" else "RGB")
    if mode == "P":
        image = image.quantize(2)
        image.save(tmp_path / "0.png", transparency=image.getpixel((0, 0)))
        expected = [0, 0, 100]
    else:
        image.putalpha(Image.fromarray(np.array([[255, 51, 0]], np.uint8), "L"))
        image.save(tmp_path / "0.png")
        expected = [200, 40, 0]
    for channels in (1, 3):
        pixels = load_pngs([tmp_path], channels)
        assert pixels[0, 0].tolist() == [[value] * channels for value in expected]
