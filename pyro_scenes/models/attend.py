"""What AIR and Discrete-AIR share: windows written on a canvas, one object after the other.

The mean of the image is the canvas after T steps (Discrete-AIR, appendix C.1)::

    C_t = C_{t-1} + z_pres_1 ... z_pres_t ST(template_t, T^d(z_where_t))

where the paper has z_pres_t alone, which is the same unless z_pres is relaxed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_scenes.affine import to_window, warp
from pyro_scenes.distributions import one_hot
from pyro_scenes.errors import UserError
from pyro_scenes.models.base import INK, SceneModel
from pyro_scenes.scene import Scene
from pyro_scenes.spatial import ink_boxes

Pose = tuple[Tensor, Tensor, Tensor, Tensor]  # scale, angle, shear, translation, see affine.py
Choose = Callable[[str, TorchDistribution, Tensor], Tensor]  # name, distribution, here -> value


@contextmanager
def counted(here: Tensor) -> Iterator[None]:
    """Sites of an object count as much as it is there, in model and guide alike; (...) in [0, 1].

    Pyro refuses a scale of 0, so that absent objects are masked too; but for a training of their
    presence, in which they have the gradient of what they would cost.
    """
    present = (here > 0) | here.requires_grad
    least = (here.clamp(min=1e-6) - here).detach()
    with poutine.mask(mask=present), poutine.scale(scale=here + least):
        yield


def sampled(name: str, site, here: Tensor) -> Tensor:
    """How a guide chooses a value."""
    with counted(here):
        return pyro.sample(name, site)


class Attend(SceneModel):
    """Base class: subclasses have `_attend`, `pose` and `templates`.

    :ivar steps: T, most objects in an image; subclasses set `most` to it.
    :ivar contrast: what is done to the pixels that an object draws on the canvas.
    """

    appearance_site = "z_what"
    steps: int
    decoders: tuple[str, ...] = ("decoder", "contrast")
    contrast: nn.Module

    @pyro_method
    def guide(self, x: Tensor) -> list[dict[str, Tensor]]:
        """:param x: (B, C, H, W) in [0, 1]. :return: what was drawn, see `_attend`."""
        self.check(x)
        with pyro.plate("images", len(x), dim=-1):
            return self._attend(x, sampled)

    def _attend(self, x: Tensor, choose: Choose) -> list[dict[str, Tensor]]:
        """Look at images object after object; ``choose`` gives each latent variable its value.

        :return: for each step "here", the product of z_pres up to it, and its latents.
        """
        raise NotImplementedError(f"{type(self).__name__} has no _attend")

    def counts(self, trace: poutine.Trace) -> Tensor:
        here: list[Tensor] = []
        for t in range(self.steps):
            site = trace.nodes[f"z_pres_{t}"]  # 0 or 1, or one-hot
            here.append(site["value"][..., 1] if site["fn"].event_dim else site["value"])
        return torch.stack(here, -1).cumprod(-1).sum(-1).long()

    def pose(self, z_where: Tensor) -> Pose:
        """What z_where (..., D) stands for."""
        raise NotImplementedError(f"{type(self).__name__} has no pose")

    def templates(self, kind: Tensor | None, what: Tensor | None) -> Tensor:
        """Objects before they are placed, (N, C, S, S) in [0, 1], of (N, K) and (N, L)."""
        raise NotImplementedError(f"{type(self).__name__} has no templates")

    def choose_likeliest(self, name: str, site, here: Tensor) -> Tensor:
        """How `infer` chooses: means, and the likeliest category and presence."""
        raise NotImplementedError(f"{type(self).__name__} has no choose_likeliest")

    def write(self, templates: Tensor, z_where: Tensor, size: tuple[int, int]) -> Tensor:
        """Templates (N, C, S, S) on canvases of their own, (..., C, H, W); z_where (..., D)."""
        drawn = self._placed(templates, self.pose(z_where.reshape(-1, z_where.shape[-1])), size)
        return drawn.view(*z_where.shape[:-1], *drawn.shape[1:])

    def _placed(self, templates: Tensor, pose: Pose, size: tuple[int, int]) -> Tensor:
        """Templates (N, C, S, S), each by its pose on a canvas of its own, (N, C, H, W)."""
        return self.contrast(warp(templates, to_window(*pose), size))

    def _drawn(self, objects: list[dict[str, Tensor]], size: tuple[int, int]) -> Tensor:
        """What objects draw together, (..., C, H, W); no time goes into those that are not there.

        :param objects: of each "here" (...), and latents (..., D) or without some dimensions.
        """
        lead = objects[-1]["here"].shape
        here = torch.stack([found["here"].expand(lead) for found in objects], -1)  # (..., T)
        there = torch.ones_like(here) if here.requires_grad else here
        there = there.flatten().nonzero().squeeze(1)  # (P,)

        def of_those(name: str) -> Tensor | None:
            if name not in objects[0]:
                return None
            values = torch.stack([found[name].expand(*lead, -1) for found in objects], -2)
            return values.flatten(0, -2)[there]  # (P, D)

        z_where = of_those("z_where")
        assert z_where is not None
        templates = self.templates(of_those("z_cat"), of_those(self.appearance_site))
        drawn = here.flatten()[there, None, None, None] * self.write(templates, z_where, size)
        canvas = drawn.new_zeros(here.numel() // len(objects), *drawn.shape[1:])
        return canvas.index_add(0, there // len(objects), drawn).view(*lead, *drawn.shape[1:])

    # --- scenes -----------------------------------------------------------------------------

    @torch.no_grad()
    def infer(self, x: Tensor, limit: float | None = None) -> Scene:
        self.check_values(x)
        # Of no images: as of a blank one, without its scene.
        seen = x if len(x) else x.new_zeros(1, *x.shape[1:])
        found = [
            {name: value[: len(x)] for name, value in step.items()}
            for step in self._attend(seen, self.choose_likeliest)
        ]
        present = torch.stack([step["here"] > 0.5 for step in found], 1)  # (B, T)
        self.within(present.sum(1), self.steps if limit is None else limit)
        latents: dict[str, Tensor] = {
            name: torch.stack([step[name] for step in found], 1)
            for name in ("z_where", "z_cat", "z_attr", "z_what") if name in found[0]
        }
        return self._scene(present, latents, (x.shape[-2], x.shape[-1]))

    def _scene(self, present: Tensor, latents: dict[str, Tensor], size: tuple[int, int]) -> Scene:
        """Latents (B, T, .) as a scene in pixels, without those of absent objects."""
        scale, angle, shear, translation = self.pose(latents["z_where"])
        half = translation.new_tensor([size[1] / 2, size[0] / 2])
        absent = ~present[..., None]
        nan = float("nan")
        pose = torch.cat([scale, angle[..., None], shear], -1).masked_fill(absent, nan)
        where = (half * (translation + 1)).masked_fill(absent, nan)
        what = latents.get("z_attr", latents.get("z_what"))
        kind = latents.get("z_cat")
        scene = Scene(
            present,
            where,
            where.new_full((*present.shape, 4), nan),
            kind=None if kind is None else kind.argmax(-1).masked_fill(~present, -1),
            what=None if what is None else what.masked_fill(absent, 0.0),
            size=size,
            pose=pose,
        )
        return replace(scene, boxes=self.boxes(scene))

    def boxes(self, scene: Scene) -> Tensor:
        """The box of each object's ink, pixels (B, M, 4); NaN where absent."""
        drawn = self.layers(scene).amax(2)  # (B, M, H, W)
        ink = self.ink(drawn, INK)
        box = ink_boxes(ink | ~ink.flatten(2).any(-1)[..., None, None])
        faint = torch.cat([scene.where, torch.ones_like(scene.where)], -1)
        box = torch.where(ink.flatten(2).any(-1)[..., None], box, faint)
        return box.masked_fill(~scene.present[..., None], float("nan"))

    @torch.no_grad()
    def usual_pose(self) -> list[float]:
        """The prior's, where all of z_where is 0."""
        mean = torch.zeros(self.prior("where")().event_shape, device=self.device)
        scale, angle, shear, _ = self.pose(mean)
        return [*scale.tolist(), angle.item(), *shear.tolist()]

    def sprites(self, scene: Scene) -> Tensor:
        """:raises UserError: if the scene has a category that the model does not know."""
        here = scene.present
        kind = None if scene.kind is None else scene.kind[here]
        if kind is not None and len(kind) and int(kind.max()) >= self.classes:
            raise UserError(
                f"the scene has category {int(kind.max())}; the model knows 0 to"
                f" {self.classes - 1}"
            )
        z_cat = None if kind is None else one_hot(kind, self.classes, scene.where.dtype)
        drawn = self.templates(z_cat, None if scene.what is None else scene.what[here])
        sprites = drawn.new_zeros(*here.shape, *drawn.shape[1:])
        sprites[here] = drawn
        return sprites

    def layers(self, scene: Scene) -> Tensor:
        if scene.pose is None:
            raise UserError(f"{type(self).__name__} draws objects by pose: the scene has none")
        height, width = scene.size or self.image_shape[1:]
        sprites = self.sprites(scene)
        layers = sprites.new_zeros(*scene.present.shape, self.image_shape[0], height, width)
        pose = scene.pose[scene.present]  # (P, 5)
        half = pose.new_tensor([width / 2, height / 2])
        translation = scene.where[scene.present] / half - 1
        parts = pose[:, :2], pose[:, 2], pose[:, 3:], translation
        layers[scene.present] = self._placed(sprites[scene.present], parts, (height, width))
        return layers

    @torch.no_grad()
    def segment(self, scene: Scene, threshold: float = INK) -> Tensor:
        return super().segment(scene, threshold)

    def group(self, part: str) -> str:
        return "model" if part in self.decoders else "guide"

    def check(self, x: Tensor) -> None:
        super().check(x)
        if tuple(x.shape[1:]) != self.image_shape:
            height, width = self.image_shape[1:]
            raise UserError(
                f"the model reads images of {height} x {width} pixels,"
                f" not {x.shape[-2]} x {x.shape[-1]}"
            )
