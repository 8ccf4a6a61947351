"""Windows on images: Discrete-AIR's factorised affine transform, and reading and writing by it.

T^d = T_st T_r T_k (eq. 1) takes window coordinates to image coordinates, and its inverse T^e =
T_k^-1 T_r^-1 T_st^-1 takes them back. Both squares go from -1 to 1, edge to edge, x to the right
and y down; the scale is the window's part of the image, and a positive angle turns clockwise as
displayed. An image is resampled once, by the product; the paper's attention passes it through two
transformers in turn, one for scale and translation and one for rotation and shear (C.1).

========  ============  ==================================================
symbol    column        meaning
========  ============  ==================================================
s_x, s_y  scale         half the window's sides, in units of half the image's; not 0
omega     angle         radians
k_x, k_y  shear         of T_k = [[1 + k_x k_y, k_x], [k_y, 1]], whose determinant is 1
t_x, t_y  translation   of the window's centre
========  ============  ==================================================
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 1e-3  # scales nearer to 0 count as this, so that the inverse exists


def to_image(scale: Tensor, angle: Tensor, shear: Tensor, translation: Tensor) -> Tensor:
    """T^d. :param angle: (...); the others (..., 2). :return: (..., 3, 3)."""
    k_x, k_y = shear.unbind(-1)
    t_r, t_k = _rotation(angle), _matrix(1 + k_x * k_y, k_x, k_y, torch.ones_like(k_x))
    s_x, s_y = _away_from_0(scale).unbind(-1)
    t_x, t_y = translation.unbind(-1)
    nothing = torch.zeros_like(s_x)
    return _matrix(s_x, nothing, nothing, s_y, t_x, t_y) @ t_r @ t_k


def to_window(scale: Tensor, angle: Tensor, shear: Tensor, translation: Tensor) -> Tensor:
    """T^e, the exact inverse of `to_image` for the same arguments, (..., 3, 3)."""
    k_x, k_y = shear.unbind(-1)
    t_r, t_k = _rotation(-angle), _matrix(torch.ones_like(k_x), -k_x, -k_y, 1 + k_x * k_y)
    s_x, s_y = _away_from_0(scale).unbind(-1)
    t_x, t_y = translation.unbind(-1)
    nothing = torch.zeros_like(s_x)
    return t_k @ t_r @ _matrix(1 / s_x, nothing, nothing, 1 / s_y, -t_x / s_x, -t_y / s_y)


def warp(source: Tensor, transform: Tensor, size: tuple[int, int]) -> Tensor:
    """Sample a picture where a transform takes each pixel, bilinear, 0 beyond its edges.

    To read windows off images, give `to_image`; to write windows onto canvases, `to_window`.

    :param source: (B, C, H, W). :param transform: (B, 3, 3), of the result's coordinates.
    :param size: (h, w) of the result. :return: (B, C, h, w).
    """
    return _sampled(source, grid(transform, size))


def grid(transform: Tensor, size: tuple[int, int]) -> Tensor:
    """Where a transform takes the centres of pixels, (..., h, w, 2), x and y.

    As torch's affine_grid, whose products of so small matrices take many times as long.

    :param transform: (..., 3, 3). :param size: (h, w).
    """
    by_x, by_y, shift = transform[..., :2, :].unbind(-1)  # (..., 2) each
    across = _centres(size[1], transform)[:, None] * by_x[..., None, :]  # (..., w, 2)
    down = _centres(size[0], transform)[:, None] * by_y[..., None, :] + shift[..., None, :]
    return down[..., :, None, :] + across[..., None, :, :]


def _centres(count: int, like: Tensor) -> Tensor:
    """Of so many cells from -1 to 1, (count,)."""
    return (2 * torch.arange(count, device=like.device, dtype=like.dtype) + 1) / count - 1


def windows(source: Tensor, transform: Tensor, side: int) -> Tensor:
    """Read several windows off each picture, as `warp` does one, without copies of the picture.

    :param source: (N, C, H, W). :param transform: (N, K, 3, 3), of window coordinates.
    :return: (N, K, C, side, side).
    """
    seen = _sampled(source, grid(transform, (side, side)).flatten(1, 2))  # (N, C, K side, side)
    return seen.unflatten(2, (transform.shape[1], side)).transpose(1, 2)


def read(source: Tensor, scale: Tensor, translation: Tensor, size: tuple[int, int]) -> Tensor:
    """`warp` by `to_image` without turn and shear: upright windows off images.

    :param source: (B, C, H, W). :param scale: (B, 2). :param translation: (B, 2).
    :param size: (h, w) of the windows. :return: (B, C, h, w).
    """
    return _sampled(source, _upright(_away_from_0(scale), translation, size))


def write(source: Tensor, scale: Tensor, translation: Tensor, size: tuple[int, int]) -> Tensor:
    """`warp` by `to_window` without turn and shear, upright windows onto canvases; as `read`."""
    scale = _away_from_0(scale)
    return _sampled(source, _upright(1 / scale, -translation / scale, size))


def _upright(scale: Tensor, shift: Tensor, size: tuple[int, int]) -> Tensor:
    """`grid` of scale and shift alone, (B, 2) each: (B, h, w, 2)."""
    across, down = (
        scale[:, i, None] * _centres(size[1 - i], scale) + shift[:, i, None] for i in (0, 1)
    )  # (B, w), (B, h)
    return torch.stack(torch.broadcast_tensors(across[:, None], down[..., None]), -1)


def _sampled(source: Tensor, where: Tensor) -> Tensor:
    """Bilinear, 0 beyond the edges. :param where: (B, h, w, 2), from -1 to 1, edge to edge."""
    return F.grid_sample(source, where, "bilinear", "zeros", align_corners=False)


def _away_from_0(scale: Tensor) -> Tensor:
    """The same sign, at least LEAST from 0."""
    sign = torch.where(scale < 0, -1.0, 1.0).to(scale)
    return sign * scale.abs().clamp(min=LEAST)


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return _matrix(cos, -sin, sin, cos)


def _matrix(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor, x: Tensor | None = None, y: Tensor | None = None
) -> Tensor:
    """[[a, b, x], [c, d, y], [0, 0, 1]] of tensors (...), (..., 3, 3)."""
    nothing, one = torch.zeros_like(a), torch.ones_like(a)
    x, y = nothing if x is None else x, nothing if y is None else y
    rows = [torch.stack(row, -1) for row in ((a, b, x), (c, d, y), (nothing, nothing, one))]
    return torch.stack(rows, -2)
