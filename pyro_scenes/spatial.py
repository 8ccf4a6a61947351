"""Places on the pixel grid: sprites put on canvases, crops taken, windows and peaks.

A place d of a canvas of H x W is row d // W and column d % W, 0 <= d < D = H * W. Windows and
sprites have odd sides, so that they have a centre pixel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def place_sprites(
    sprites: Tensor,
    places: Tensor,
    image: Tensor,
    size: tuple,
    slope: float | None = None,
    reach: int | None = None,
) -> Tensor:
    """Convolve each sprite with its place and add up the objects of each image (LAVAE, eq. 4).

    :param sprites: (P, C, S, S), the objects of all images in one list.
    :param places: (P, D), each one-hot or a relaxed one-hot vector.
    :param image: (P,) long, the image that the object belongs to.
    :param size: (B, H, W).
    :param slope: limit of the canvas's gradient, each value, on its way to the places alone. The
        gradient of a one-hot place is a linearisation: an ink pixel that no sprite covers has
        slope 1 / mean in a Bernoulli image, which for a mean near 0 is far more than covering it
        would ever gain.
    :param reach: where all places are one-hot, their gradient is taken at so many pixels round
        each alone, less that at the place itself. Farther away it is 0, as at the place.
    :return: (B, C, H, W); parts of a sprite beyond the canvas are cut.
    """
    given = sprites, places, image, size, slope, reach
    if has_torch_function(given):  # as Pyro's tensors that know which draws they depend on
        return handle_torch_function(place_sprites, given, *given)
    return _Place.apply(*given)


class _Place(torch.autograd.Function):
    """The convolution, without its cost where a place is one-hot: forward, the sprite is added in.

    The gradient for a place is the correlation of the sprite with the canvas's gradient, at every
    pixel, so that a relaxed draw learns of the places that it did not take.
    """

    @staticmethod
    def forward(ctx, sprites, places, image, size, slope, reach):
        batch, height, width = size
        count, channels, side, _ = sprites.shape
        hard = bool((places.detach().amax(-1) == 1).all())
        ctx.size, ctx.slope, ctx.reach, ctx.hard = size, slope, reach, hard
        ctx.save_for_backward(sprites, places, image)
        if not hard:
            maps = places.view(count, 1, height, width)
            drawn = _crop(_convolve(maps, sprites), side // 2, height, width)
            canvas = drawn.new_zeros(batch, channels, height, width)
            return canvas.index_add_(0, image, drawn)
        padded = height + side - 1, width + side - 1
        canvas = sprites.new_zeros(batch * channels * padded[0] * padded[1])
        index = _window_index(places.argmax(-1), image, channels, side, width, padded)
        canvas.index_add_(0, index.flatten(), sprites.flatten())
        return _crop(canvas.view(batch, channels, *padded), side // 2, height, width)

    @staticmethod
    def backward(ctx, grad):
        sprites, places, image = ctx.saved_tensors
        _, height, width = ctx.size
        count, channels, side, _ = sprites.shape
        if count == 0:  # FFTs refuse it
            return torch.zeros_like(sprites), torch.zeros_like(places), None, None, None, None
        half = side // 2
        grad_sprites = grad_places = None
        if ctx.needs_input_grad[0]:
            if ctx.hard:
                grad_sprites = crops(grad, places.argmax(-1), side, image)
            else:
                maps = places.view(count, 1, height, width)
                around = F.pad(grad, (half,) * 4)[image]
                grad_sprites = _correlate(around, maps)[..., :side, :side]
        if ctx.needs_input_grad[1]:
            limited = grad if ctx.slope is None else grad.clamp(-ctx.slope, ctx.slope)
            if ctx.hard and ctx.reach is not None:
                grad_places = _near_scores(limited, sprites, image, places, ctx.reach)
            else:
                grad_places = _scores(limited, sprites, image)
            grad_places = grad_places.reshape(count, height * width)
        return grad_sprites, grad_places, None, None, None, None


def _convolve(a: Tensor, b: Tensor) -> Tensor:
    """Full 2-d convolution of the last two dimensions, by FFT."""
    size = [_fast(a.shape[i] + b.shape[i] - 1) for i in (-2, -1)]
    return torch.fft.irfft2(torch.fft.rfft2(a, s=size) * torch.fft.rfft2(b, s=size), s=size)


def _correlate(a: Tensor, b: Tensor) -> Tensor:
    """Valid correlation of a with b, first corner, by FFT."""
    size = [_fast(a.shape[i]) for i in (-2, -1)]
    first, second = torch.fft.rfft2(a, s=size), torch.fft.rfft2(b, s=size).conj()
    return torch.fft.irfft2(first * second, s=size)


def _scores(canvas: Tensor, sprites: Tensor, image: Tensor) -> Tensor:
    """Correlation of each sprite with its image's canvas, centred on each place, (P, H, W).

    By FFT. Half a sprite of zeros is enough between one edge and, round the circle, the other.
    """
    height, width = canvas.shape[-2:]
    half = sprites.shape[-1] // 2
    size = [_fast(max(side + half, 2 * half + 1)) for side in (height, width)]
    canvas = torch.view_as_real(torch.fft.rfft2(canvas, s=size))
    # Real numbers are copied several times faster than complex ones.
    spectrum = torch.view_as_complex(canvas.index_select(0, image))  # (P, C, ., .)
    spectrum.mul_(torch.fft.rfft2(sprites, s=size).conj())
    scores = torch.fft.irfft2(spectrum.sum(1), s=size)
    return scores.roll((half, half), (-2, -1))[..., :height, :width]


def _near_scores(
    canvas: Tensor, sprites: Tensor, image: Tensor, places: Tensor, reach: int
) -> Tensor:
    """The same within reach of each place, less the score at the place; elsewhere 0, (P, H, W)."""
    height, width = canvas.shape[-2:]
    place, side = places.argmax(-1), 2 * reach + 1
    around = crops(canvas, place, sprites.shape[-1] + 2 * reach, image)
    scores = _correlate(around, sprites)[..., :side, :side].sum(1, keepdim=True)  # (P, 1, ., .)
    scores = scores - scores[..., reach, None, reach, None]
    padded = height + 2 * reach, width + 2 * reach
    maps = scores.new_zeros(len(place) * padded[0] * padded[1])
    index = _window_index(place, torch.arange(len(place), device=place.device), 1, side, width,
                          padded)
    maps.index_add_(0, index.flatten(), scores.flatten())
    return _crop(maps.view(-1, *padded), reach, height, width)


def _fast(size: int) -> int:
    """The next size whose only factors are 2, 3, 5 and 7: FFTs are quick there."""
    while True:
        rest = size
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def _crop(canvas: Tensor, half: int, height: int, width: int) -> Tensor:
    return canvas[..., half : half + height, half : half + width]


def _window_index(
    place: Tensor, image: Tensor, channels: int, side: int, width: int, padded: tuple
) -> Tensor:
    """Flat indices (P, C, S, S) of the windows whose top left corner is at the place."""
    device = place.device
    rows = (place // width)[:, None] + torch.arange(side, device=device)  # (P, S)
    columns = (place % width)[:, None] + torch.arange(side, device=device)  # (P, S)
    planes = image[:, None] * channels + torch.arange(channels, device=device)  # (P, C)
    rows = planes[:, :, None] * padded[0] + rows[:, None]  # (P, C, S)
    return rows[..., None] * padded[1] + columns[:, None, None]  # (P, C, S, S)


def crops(x: Tensor, place: Tensor, side: int, image: Tensor) -> Tensor:
    """The windows of x centred on places, 0 beyond the canvas.

    :param x: (B, C, H, W). :param place: (P,) long. :param side: odd, pixels.
    :param image: (P,) long, which of the B each place is in.
    :return: (P, C, side, side).
    """
    channels, width = x.shape[1], x.shape[3]
    around = F.pad(x, (side // 2,) * 4)
    padded = around.shape[-2], around.shape[-1]
    index = _window_index(place, image, channels, side, width, padded)
    return around.flatten()[index]


def window_masks(place: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """A square window round each place, as a mask over places.

    :param place: (...) long. :param side: odd, pixels. :param size: (H, W), of the canvas.
    :return: (..., H * W) float of 0 and 1.
    """
    rows, columns = (torch.arange(length, device=place.device) for length in size)
    near_row = (rows - (place // size[1])[..., None]).abs() <= side // 2  # (..., H)
    near_column = (columns - (place % size[1])[..., None]).abs() <= side // 2  # (..., W)
    # A product of floats is quicker than an and of booleans.
    return (near_row.float().unsqueeze(-1) * near_column.float().unsqueeze(-2)).flatten(-2)


def find_peaks(heights: Tensor, threshold: float, side: int) -> Tensor:
    """Pixels above a threshold that are the largest of their window (LAVAE, appendix B).

    :param heights: (B, H, W). :param side: odd, pixels. :return: (B, H, W) bool.
    """
    # A square's maximum is the maximum of its rows' maxima.
    highest = _running_max(_running_max(heights, side).mT, side).mT
    return (heights >= highest) & (heights > threshold)


def _running_max(x: Tensor, side: int) -> Tensor:
    """Maximum over windows of the last dimension, by doubling: cheaper than pooling by far."""
    length = x.shape[-1]
    x = F.pad(x, (side // 2, side // 2), value=-math.inf)
    reach = 1
    while 2 * reach <= side:
        x = torch.maximum(x[..., :-reach], x[..., reach:])
        reach *= 2
    return torch.maximum(x[..., :length], x[..., side - reach :])


def ink_boxes(ink: Tensor) -> Tensor:
    """The tight box of each mask, which has at least one pixel.

    :param ink: (..., H, W) bool. :return: (..., 4) float: centre x, y, width, height, in pixels.
    """
    ends = []
    for axis in (-2, -1):  # columns, then rows
        line = ink.any(axis).float()
        low, high = line.argmax(-1), line.shape[-1] - line.flip(-1).argmax(-1)
        ends.append(((low + high) / 2, (high - low).float()))
    (x, w), (y, h) = ends
    return torch.stack([x, y, w, h], -1)
