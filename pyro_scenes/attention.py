"""Where to look next, and how a picture there compares with templates: what guides see with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_scenes.affine import read

RADII = 10  # of the polar grid
# Its largest radius, in units of half a window: corners of what fills the window count too.
FARTHEST = 1.1
SORTED = 6  # times that pixels go to the nearer of two centres


class InkPeak(nn.Module):
    """The place with most unexplained ink around it.

    :param blur: standard deviation of what "around" means, pixels.
    :param shut: that of the dip which objects found before leave, pixels: what is left of a badly
        explained object must not draw the next look to it again.
    """

    def __init__(self, blur: float, shut: float):
        super().__init__()
        self.blur, self.shut = blur, shut

    @torch.no_grad()
    def forward(self, difference: Tensor, found: list[Tensor]) -> Tensor:
        """:param difference: (N, C, H, W), image less canvas. :param found: of (N, 2), as returned.
        :return: (N, 2), x and y from -1 to 1 across the image.
        """
        ink = difference.clamp(min=0).sum(1)  # (N, H, W)
        height, width = (
            torch.arange(side, device=ink.device, dtype=ink.dtype) for side in ink.shape[-2:]
        )
        # At half resolution. Products with matrices take a third of what pooling and convolutions
        # of one channel do.
        ink = _halving(height) @ ink @ _halving(width).T  # (N, h, w)
        heat = self._blurring(height[::2]) @ ink @ self._blurring(width[::2])
        rows, columns = ((2 * cells[::2] + 2) / len(cells) - 1 for cells in (height, width))

        def around(x: Tensor, y: Tensor, deviation: float) -> Tensor:
            """A bump of height 1 at each place, (N, h, w)."""
            across = (columns - x[:, None]) * len(width) / 2 / deviation
            down = (rows - y[:, None]) * len(height) / 2 / deviation
            across, down = (torch.exp(-0.5 * apart.square()) for apart in (across, down))
            return down[:, :, None] * across[:, None]

        for centre in found:
            x, y = centre.unbind(-1)
            heat = heat * (1 - around(x, y, self.shut))
        place = heat.flatten(1).argmax(1)
        x, y = columns[place % len(columns)], rows[place // len(columns)]
        # From the grid to the centre of the ink that made the peak: one step of a mean shift.
        mine = ink * around(x, y, self.blur)
        whole = mine.sum((1, 2)).clamp(min=1e-6)
        mean = torch.stack([(mine.sum(1) * columns).sum(1), (mine.sum(2) * rows).sum(1)], -1)
        return torch.where(whole[:, None] > 1e-3, mean / whole[:, None], torch.stack([x, y], -1))

    def _blurring(self, cells: Tensor) -> Tensor:
        """What each of some cells has of the others once blurred, (h, h).

        :param cells: (h,), where they are, pixels.
        """
        apart = (cells[:, None] - cells).abs()
        weights = torch.exp(-0.5 * (apart / self.blur).square())
        return weights * (apart <= 2 * math.ceil(1.5 * self.blur))


def _halving(pixels: Tensor) -> Tensor:
    """Means of pairs of pixels; of an odd number the last counts half, as if beside an empty one.

    :param pixels: (H,), their numbers. :return: (ceil(H / 2), H).
    """
    return 0.5 * (pixels // 2 == pixels[::2, None] / 2).to(pixels)


class TurnSearch(nn.Module):
    """The angle at which each template fits a picture best: correlation round circles, by FFT.

    :param angles: how many are tried; between neighbours a parabola finds the maximum.
    """

    def __init__(self, angles: int):
        super().__init__()
        radius = FARTHEST * (torch.arange(RADII) + 0.5) / RADII
        angle = torch.arange(angles) * 2 * math.pi / angles
        x, y = radius[:, None] * angle.cos(), radius[:, None] * angle.sin()
        self.grid = nn.Buffer(torch.stack([x, y], -1), persistent=False)  # (R, A, 2)
        self.area = nn.Buffer(radius / radius.sum(), persistent=False)  # a ring's, (R,)

    @torch.no_grad()
    def forward(
        self, templates: Tensor, difference: Tensor, scale: Tensor, centre: Tensor
    ) -> Tensor:
        """:param templates: (K, C, S, S). :param difference: (N, C, H, W).
        :param scale: (N, K, 2), of windows in the picture. :param centre: (N, K, 2), of them.
        :return: (N, K) radians from -pi to pi, clockwise as displayed.
        """
        count, kinds = centre.shape[:2]
        angles = self.grid.shape[1]
        still = F.grid_sample(
            templates, self.grid.expand(kinds, -1, -1, -1), align_corners=False
        )  # (K, C, R, A)
        grid = centre[:, :, None, None] + scale[:, :, None, None] * self.grid  # (N, K, R, A, 2)
        seen = F.grid_sample(difference, grid.flatten(1, 2), align_corners=False)
        seen = seen.unflatten(2, (kinds, -1)).transpose(1, 2)  # (N, K, C, R, A)
        still = torch.fft.rfft(still * self.area[:, None]).conj()
        fit = torch.fft.irfft((torch.fft.rfft(seen) * still).sum((2, 3)), n=angles)  # (N, K, A)
        best = fit.argmax(-1, keepdim=True)
        before, here, after = (fit.gather(-1, (best + i) % angles).squeeze(-1) for i in (-1, 0, 1))
        curve = (before - 2 * here + after).clamp(max=-1e-9)
        best = best.squeeze(-1) + (0.5 * (before - after) / curve).clamp(-0.5, 0.5)
        return torch.remainder(best * 2 * math.pi / angles + math.pi, 2 * math.pi) - math.pi


def glimpse(source: Tensor, centre: Tensor, side: int) -> Tensor:
    """The picture round a centre, pixel for pixel, (N, C, side, side).

    :param source: (N, C, H, W). :param centre: (N, 2), from -1 to 1 across the image.
    """
    scale = source.new_tensor([side / source.shape[-1], side / source.shape[-2]])
    return read(source, scale.expand_as(centre), centre, (side, side))


@torch.no_grad()
def halves(difference: Tensor) -> Tensor:
    """Where the nearer of two centres of the unexplained ink is the first, (N, 1, H, W) in 0, 1.

    By k-means from both sides of the middle, along the axis in which the ink is longest.

    :param difference: (N, C, H, W), image less canvas.
    """
    height, width = difference.shape[-2:]
    ink = difference.clamp(min=0).sum(1).flatten(1) + 1e-6  # (N, P)
    rows, columns = torch.meshgrid(
        *(torch.arange(side, device=ink.device, dtype=ink.dtype) for side in (height, width)),
        indexing="ij",
    )
    pixels = torch.stack([columns, rows], -1).flatten(0, 1)  # (P, 2)
    shares = ink / ink.sum(1, keepdim=True)
    middle = shares @ pixels  # (N, 2)
    squares = (pixels[:, :, None] * pixels[:, None]).flatten(1)  # (P, 4)
    spread = (shares @ squares).unflatten(1, (2, 2)) - middle[:, :, None] * middle[:, None]
    values, axes = torch.linalg.eigh(spread)
    along = values[:, -1:].clamp(min=0).sqrt() * axes[..., -1]
    centres = torch.stack([middle + along, middle - along], 1)  # (N, 2, 2)
    for _ in range(SORTED):
        first = torch.cdist(pixels, centres).argmin(-1) == 0  # (N, P)
        parts = ink[:, None] * torch.stack([first, ~first], 1)  # (N, 2, P)
        whole = parts.sum(-1, keepdim=True)
        centres = torch.where(whole > 0, parts @ pixels / whole, centres)
    return first.view(-1, 1, height, width).to(difference.dtype)


def gain(seen: Tensor, drawn: Tensor, area: Tensor, sigma: float) -> Tensor:
    """What drawing a template adds to a normal log likelihood of the picture, nats, (...).

    ||x||^2 - ||x - y||^2 = 2 <x, y> - ||y||^2, summed over the window that y is drawn in.

    :param seen: (..., C, S, S), read from the picture by the template's window.
    :param drawn: (..., C, S, S), the template. :param area: (...) pixels of a window's cell.
    """
    return area * (2 * seen * drawn - drawn * drawn).sum((-3, -2, -1)) / (2 * sigma**2)
