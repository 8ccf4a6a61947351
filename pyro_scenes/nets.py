"""The building blocks of the inference and generative networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_scenes.affine import grid
from pyro_scenes.spatial import crops


def widened(x: Tensor) -> Tensor:
    """bfloat16 -> float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ConvBlock(nn.Sequential):
    """Convolution, activation, normalisation: (B, inputs, H, W) -> (B, outputs, H', W')."""

    def __init__(self, inputs, outputs, kernel=3, stride=1, norm="group", activation=nn.SiLU):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2),
            activation(),
            normalisation(norm, outputs),
        )


def normalisation(kind: str, channels: int) -> nn.Module:
    """``batch`` as the papers have it; ``group`` has no running statistics that could lag, but what
    it makes of a place depends on all of the image; ``none`` changes nothing.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "none":
        return nn.Identity()
    return nn.GroupNorm(8 if channels % 8 == 0 else 1, channels)


class ResidualBlock(nn.Module):
    """Two convolutions and a skip, (B, channels, H, W) -> the same."""

    def __init__(self, channels: int, norm: str = "group", activation=nn.SiLU):
        super().__init__()
        self.body = nn.Sequential(
            ConvBlock(channels, channels, norm=norm, activation=activation),
            ConvBlock(channels, channels, norm=norm, activation=activation),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class GatedBlock(nn.Module):
    """Two convolutions, of which the first gates half of its channels by the others, and a skip.

    (B, channels, H, W) -> the same.

    What is drawn times where it is drawn is a product. Without norms: a block starts near the
    identity, and sees no more than what is near.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gated = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        gated = 2 * F.glu(self.gated(x), 1)  # gates start near a half
        return x + self.gain * F.silu(self.conv(gated))


# Of each 2 x 2 cells the row and column of the one that is drawn first, second ...: diagonal ones
# first, so that the last two lie between cells that are known.
PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))


def cells(grid: Tensor, phase: int, phases: int) -> Tensor:
    """Those of one phase, (..., R, C) -> (..., r, c), a view; all of them if there is one phase."""
    if phases == 1:
        return grid
    row, column = PHASES[phase]
    return grid[..., row::2, column::2]


class PhaseNet(nn.Module):
    """Cells that are known -> mean and log variance of those of the next phase, on a grid.

    The same weights serve all phases, so that all learn from all; only where it starts differs.

    :param latent: K, numbers in a cell. :param features: F, of what else is seen of each, or 0.
    :param hidden: channels of what is between.
    :param reach: side of the window of cells that is looked at, odd.
    """

    def __init__(self, latent: int, features: int, hidden: int, reach: int = 5):
        super().__init__()
        self.reach = reach
        self.start = nn.Parameter(0.1 * torch.randn(len(PHASES), 2 * hidden, 1, 1))
        self.known = nn.Conv2d(latent, 2 * hidden, reach, stride=2, bias=False)
        self.seen = nn.Conv2d(features, 2 * hidden, 1) if features else None
        self.body = nn.ModuleList(nn.Conv2d(hidden, hidden, 1) for _ in range(2))
        self.last = nn.Conv2d(hidden, 2 * latent, 1)

    def forward(self, phase: int, z: Tensor, h: Tensor | None = None) -> Tensor:
        """(..., K, R, C), 0 where not known yet, and (B, F, R, C) -> (..., 2 K, r, c)."""
        (row, column), margin = PHASES[phase], self.reach // 2
        near = F.pad(z, (margin,) * 4)[..., row:, column:]  # windows centred on the phase's cells
        known = self.known(near.reshape(-1, *near.shape[-3:])) + self.start[phase]
        known = known.unflatten(0, z.shape[:-3] or (1,))
        if self.seen is not None and h is not None:
            known = known + self.seen(cells(h, phase, len(PHASES)))
        y = 2 * F.glu(known.flatten(0, -4), 1)  # gates start near a half
        for layer in self.body:
            y = y + F.silu(layer(y))
        return self.last(y).unflatten(0, known.shape[:-3])


class LocationNet(nn.Module):
    """Image -> heights of the location map in (0, 4), one a pixel; fast.

    A stem at half resolution, a residual trunk at a quarter, and two pixel shuffles back. The
    sigmoid pins both ends of the logits, which the paper assumes to be 0 or a constant: a softmax
    sees neither a common offset nor a height that no other place competes for, and the counting
    threshold sees both. Unbounded, large objects rise until small ones fall below the threshold.
    The last layer is float32, because bfloat16 would make ties at the peaks.
    """

    stride = 4

    def __init__(self, channels: int, width: int, blocks: int):
        super().__init__()
        half = width // 2
        self.stem = ConvBlock(channels, half, kernel=5, stride=2)
        self.down = ConvBlock(half, width, stride=2)
        self.trunk = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.up = nn.Conv2d(width, 4 * half, 1)
        self.join = ConvBlock(2 * half, half)
        self.head = nn.Conv2d(half, 4, 1)
        nn.init.constant_(self.head.bias, -4.0)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W)."""
        fine = self.stem(x)
        coarse = self.trunk(self.down(fine))
        features = self.join(torch.cat([fine, F.pixel_shuffle(self.up(coarse), 2)], 1))
        with torch.autocast(x.device.type, enabled=False):
            # A 1 x 1 convolution as a product of matrices, several times as fast.
            weight, bias = self.head.weight.flatten(1), self.head.bias
            assert bias is not None
            raw = weight @ widened(features).flatten(2) + bias[:, None]  # (B, 4, HW / 4)
            raw = F.pixel_shuffle(raw.unflatten(-1, features.shape[-2:]), 2)
        return 4.0 * raw.sigmoid().squeeze(1)


class PaperTrunk(nn.Sequential):
    """The residual network of LAVAE's appendix B: 4 blocks of 2 convolutions at full resolution,
    after a convolution to their width.

    (B, C, H, W) -> (B, width, H, W).
    """

    def __init__(self, channels: int, width: int):
        act = nn.LeakyReLU
        super().__init__(
            ConvBlock(channels, width, norm="batch", activation=act),
            *(ResidualBlock(width, "batch", act) for _ in range(4)),
        )


class PaperLocationNet(nn.Module):
    """The trunk and a 3-layer convolutional network with one output channel (appendix B)."""

    stride = 1

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.net = nn.Sequential(
            PaperTrunk(channels, width),
            ConvBlock(width, width // 2, norm="batch", activation=nn.LeakyReLU),
            ConvBlock(width // 2, width // 2, norm="batch", activation=nn.LeakyReLU),
        )
        self.head = nn.Conv2d(width // 2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.head(widened(self.net(x))).squeeze(1)


def _strided(channels: int, width: int) -> list[nn.Module]:
    """Three convolutions to an eighth of a picture's sides, rounded up, and 2 x width channels."""
    return [
        nn.Conv2d(channels, width, 5, 2, 2),
        nn.SiLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.SiLU(),
        nn.Conv2d(2 * width, 2 * width, 3, 2, 1),
        nn.SiLU(),
        nn.Flatten(),
    ]


class CropEncoder(nn.Module):
    """Crop -> mean and log variance of z_app: three strided convolutions and two linear layers."""

    def __init__(self, channels: int, side: int, latent: int, width: int, hidden: int):
        super().__init__()
        self.side = side
        self.convolutions = nn.Sequential(*_strided(channels, width))
        cells = (-(-side // 8)) ** 2
        self.head = nn.Sequential(
            nn.Linear(2 * width * cells, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent)
        )

    def forward(self, x: Tensor, places: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), (P, D) one-hot, (P,) long -> two of (P, L)."""
        # Particles of one image often share a place: each is read once.
        key, back = torch.unique(
            image * places.shape[-1] + places.detach().argmax(-1), return_inverse=True
        )
        crop = crops(x, key % places.shape[-1], self.side, key // places.shape[-1])
        mean, log_variance = widened(self.head(self.convolutions(crop))).chunk(2, -1)
        return mean[back], log_variance[back]


class PaperAppearanceNet(nn.Module):
    """Image -> map of appearance parameters, looked up at the place (LAVAE, eq. 9)."""

    def __init__(self, channels: int, width: int, latent: int):
        super().__init__()
        self.net = nn.Sequential(
            PaperTrunk(channels, width), nn.Conv2d(width, 2 * latent, 3, padding=1)
        )

    def forward(self, x: Tensor, places: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), (P, D) one-hot or relaxed, (P,) long -> two of (P, L)."""
        maps = widened(self.net(x)).flatten(2)  # (B, 2 L, D)
        at = [maps[b] @ z for b, z in zip(image.tolist(), places, strict=True)]
        # A sum over no image keeps the network in the graph, see LAVAE.slots.
        looked_up = torch.stack(at) if at else maps[:0].sum(-1)
        mean, log_variance = widened(looked_up).chunk(2, -1)
        return mean, log_variance


class SpriteMLP(nn.Module):
    """z_app -> sprite, fully connected; sprites are small, so this costs least a step."""

    def __init__(self, latent: int, channels: int, side: int, hidden: tuple[int, ...]):
        super().__init__()
        self.net = mlp(latent, hidden, channels * side * side)
        self.shape = (channels, side, side)
        # Sprites start dim: a bright square would cover several objects before any is found.
        nn.init.constant_(self.net[-1].bias, -2.0)  # type: ignore[arg-type]

    def forward(self, z: Tensor) -> Tensor:
        """(P, L) -> (P, C, S, S) in (0, 1)."""
        return widened(self.net(z)).view(-1, *self.shape).sigmoid()


class Contrast(nn.Module):
    """Values in [0, 1], y^g / (y^g + (1 - y)^g) for a learned g: what was blurred gets sharp edges.

    0, a half and 1 stay what they are.
    """

    SHARPEST = 5.0  # largest logarithm of g, and of 1 / g

    def __init__(self) -> None:
        super().__init__()
        self.log_exponent = nn.Parameter(torch.zeros(()))

    def forward(self, y: Tensor) -> Tensor:
        exponent = self.log_exponent.clamp(-self.SHARPEST, self.SHARPEST).exp()
        sharp = torch.sigmoid(exponent * torch.logit(y, eps=1e-6))
        # Where nothing is drawn nothing may be, of an exponent below 1 too.
        return torch.where((y > 0) & (y < 1), sharp, y.detach())


class Deformation(nn.Linear):
    """z_attr -> how a picture is bent, and how bold it is drawn: linear, the same for any picture.

    What it adds to the coordinates at which a picture is read is smooth, of POINTS a side; then the
    odds of each value, v / (1 - v), are multiplied by a number. Neither makes ink where there is
    none, nor takes it away from a part alone, so that a shape remains the shape that it is.
    """

    POINTS = 4
    BOLDEST = 4.0  # largest logarithm of what odds are multiplied by

    def __init__(self, attributes: int):
        super().__init__(attributes, 2 * self.POINTS**2 + 1, bias=False)
        nn.init.normal_(self.weight, std=0.03)
        with torch.no_grad():
            self.weight[-1] *= 5  # logarithms of odds are larger than parts of a picture

    def forward(self, picture: Tensor, attributes: Tensor) -> Tensor:  # type: ignore[override]
        """:param picture: (N, C, S, S) in [0, 1]. :param attributes: (N, A). :return: as it."""
        size = picture.shape[-2], picture.shape[-1]
        bends, bold = self.weight.split([2 * self.POINTS**2, 1])
        # Interpolating is linear too, so that of the weights it serves all pictures.
        field = F.interpolate(
            bends.T.unflatten(-1, (2, self.POINTS, self.POINTS)), size=size, mode="bicubic",
            align_corners=True,
        )  # (A, 2, S, S), x and y, 2 across the picture
        still = grid(torch.eye(3).to(field), size)  # (S, S, 2)
        place = torch.addmm(still.flatten(), attributes, field.permute(0, 2, 3, 1).flatten(1))
        bent = F.grid_sample(picture, place.view(-1, *still.shape), align_corners=False)
        odds = F.linear(attributes, bold).clamp(-self.BOLDEST, self.BOLDEST)
        odds = odds.exp()[..., None, None]  # (N, 1, 1, 1)
        return bent * odds / (1 - bent + bent * odds)


class PaperSprite(nn.Module):
    """f_sprite of LAVAE's appendix B: linear, convolution, interpolation, 3 residual blocks."""

    def __init__(self, latent: int, channels: int, side: int, width: int):
        super().__init__()
        self.side, self.width, self.start = side, width, (side + 1) // 2
        act = nn.LeakyReLU
        cells = self.start**2
        self.linear = nn.Sequential(
            nn.Linear(latent, 8 * cells), act(), LoneBatchNorm1d(8 * cells)
        )
        self.convolution = ConvBlock(8, width - latent, norm="batch", activation=act)
        self.blocks = nn.Sequential(
            ResidualBlock(width, "batch", act),
            ResidualBlock(width, "batch", act),
            _PlainResidualBlock(width),
        )
        self.head = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(P, L) -> (P, C, S, S) in (0, 1)."""
        small = self.convolution(self.linear(z).view(len(z), 8, self.start, self.start))
        large = F.interpolate(
            small, size=(self.side, self.side), mode="bilinear", align_corners=False
        )
        spread = z[:, :, None, None].expand(-1, -1, self.side, self.side)  # (P, L, S, S)
        return widened(self.head(self.blocks(torch.cat([large, spread], 1)))).sigmoid()


class LoneBatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation that takes one row too, by the running statistics: it has no spread."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, K) -> (N, K)."""
        if len(x) != 1:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class _PlainResidualBlock(nn.Module):
    """The last residual block, without normalisation and final activation (appendix B).

    The paper leaves open whether an activation stays between its convolutions; here one does.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.leaky_relu(self.first(x)))


class WindowEncoder(nn.Sequential):
    """Window (N, C, side, side) -> (N, features): three strided convolutions and a linear layer."""

    def __init__(self, channels: int, side: int, width: int, features: int):
        cells = (-(-side // 8)) ** 2
        super().__init__(
            *_strided(channels, width),
            nn.Linear(2 * width * cells, features),
            nn.SiLU(),
        )


class PaperEmbedding(nn.Sequential):
    """Image -> features: convolutions and pooling, then all places in one vector (D-AIR, C.1).

    (N, C, H, W) -> (N, 32 * (H // 8) * (W // 8)).
    """

    def __init__(self, channels: int, size: tuple[int, int]):
        layers: list[nn.Module] = []
        for inputs, outputs in zip((channels, 16, 24), (16, 24, 32), strict=True):
            layers += [
                nn.Conv2d(inputs, outputs, 5, padding=2), nn.BatchNorm2d(outputs), nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        super().__init__(*layers, nn.Flatten())
        self.features = 32 * (size[0] // 8) * (size[1] // 8)


class PaperEncoder(nn.Sequential):
    """Window (N, C, side, side) -> (N, features): three strided convolutions (D-AIR, C.1)."""

    def __init__(self, channels: int, side: int):
        layers: list[nn.Module] = []
        for inputs, outputs in zip((channels, 48, 64), (48, 64, 96), strict=True):
            layers += [
                nn.Conv2d(inputs, outputs, 5, 2, 2), nn.BatchNorm2d(outputs), nn.ReLU(),
            ]
        super().__init__(*layers, nn.Flatten())
        self.features = 96 * (-(-side // 8)) ** 2


class PaperDecoder(nn.Sequential):
    """Code (N, code) -> window (N, C, 32, 32): linear, transposed convolutions (D-AIR, table 2)."""

    def __init__(self, code: int, channels: int):
        super().__init__(
            nn.ReLU(), nn.Linear(code, 1024), nn.ReLU(), nn.Unflatten(-1, (64, 4, 4)),
            nn.ConvTranspose2d(64, 48, 4, 2, 1), nn.BatchNorm2d(48), nn.ReLU(),
            nn.ConvTranspose2d(48, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, channels, 4, 2, 1), nn.Sigmoid(),
        )
        # Templates start dim, as sprites do.
        nn.init.constant_(self[-2].bias, -2.0)  # type: ignore[arg-type]


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear layers with SiLU between, (..., inputs) -> (..., outputs)."""
    sizes = (inputs, *hidden)
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class LookingCell(nn.LSTMCell):
    """An LSTM cell that takes its input in two parts, of which the first may serve many steps."""

    def opened(self, seen: int) -> tuple[Callable, Callable]:
        """``look`` and ``step``, for all steps of a run: the weights are taken apart once.

        look: the first part of an input, (N, seen) -> what it adds to the gates, (N, 4 h).
        step: that, the second part (N, I - seen), and the state or None -> state, cell: (N, h).
        """
        first, second = self.weight_ih.split([seen, self.input_size - seen], 1)
        bias = self.bias_ih + self.bias_hh

        def look(part: Tensor) -> Tensor:
            return F.linear(part, first, bias)

        def step(
            looked: Tensor, part: Tensor, state: tuple[Tensor, Tensor] | None
        ) -> tuple[Tensor, Tensor]:
            gates = looked + F.linear(part, second)
            if state is not None:
                gates = gates + F.linear(state[0], self.weight_hh)
            let_in, keep, new, let_out = gates.chunk(4, -1)
            cell = let_in.sigmoid() * new.tanh()
            if state is not None:
                cell = cell + keep.sigmoid() * state[1]
            return let_out.sigmoid() * cell.tanh(), cell

        return look, step
