"""Pictures: which scenes are rendered for a figure, and what its tables and labels say."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_scenes import pictures, plots
from pyro_scenes.errors import UserError
from pyro_scenes.models import SceneModel
from pyro_scenes.models.air import AIR, AIRConfig
from pyro_scenes.models.conv_vae import ConvVAE, ConvVAEConfig
from pyro_scenes.models.discrete_air import DiscreteAIR, DiscreteAIRConfig
from pyro_scenes.models.lavae import LAVAE, LAVAEConfig
from pyro_scenes.pictures import changed as changing
from pyro_scenes.scene import Scene

SHAPE = (1, 16, 16)
KINDS = DiscreteAIRConfig(
    max_objects=2, classes=3, attributes=2, window=8, code=6, decoder_hidden=(5,), hidden=6,
    glimpse=8, glimpse_width=2, angles=8, isotropic=False,
)
PLAIN = AIRConfig(
    max_objects=2, latent=8, window=8, decoder_hidden=(5,), encoder_hidden=(5,), hidden=6,
    glimpse=8, glimpse_width=2,
)
LOCAL = LAVAEConfig(
    max_objects=9, latent=3, sprite=5, crop=7, location_width=8, location_blocks=1,
    appearance_width=4, appearance_hidden=8, sprite_hidden=(8,), count_threshold=0.0,
)
MODELS = {
    "attributes": lambda: DiscreteAIR(KINDS, SHAPE),
    "no attributes": lambda: DiscreteAIR(replace(KINDS, attributes=0), SHAPE),
    "air": lambda: AIR(PLAIN, SHAPE),
    "lavae": lambda: LAVAE(LOCAL, SHAPE),
}
NAMES = {"inference", "tables", "steps", "traversal", "swap", "samples"}


class Given(SceneModel):
    """Finds the same scenes in all images, and draws each object as a pixel of its own value."""

    def __init__(self, scene: Scene):
        super().__init__()
        self.scene, self.image_shape = scene, SHAPE
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def infer(self, x: Tensor, limit: float | None = None) -> Scene:
        return self.scene

    def layers(self, scene: Scene) -> Tensor:
        layers = torch.zeros(*scene.present.shape, *self.image_shape)
        for b, m in scene.present.nonzero().tolist():
            column, row = scene.where[b, m].long().tolist()
            layers[b, m, 0, row, column] = 0.1 * (m + 1)
        return layers

    def render(self, scene: Scene) -> Tensor:
        return self.layers(scene).sum(1)


def scene_of(*places: list[tuple[float, float]], **fields: Any) -> Scene:
    """Scenes of objects at these centres, with boxes of 4 x 2 pixels."""
    slots = max(map(len, places))
    present = torch.tensor([len(row) for row in places])[:, None] > torch.arange(slots)
    where = torch.full((len(places), slots, 2), math.nan)
    for b, row in enumerate(places):
        where[b, :len(row)] = torch.tensor(row).reshape(-1, 2)
    boxes = torch.cat([where, where * 0 + torch.tensor([4.0, 2.0])], -1)
    return Scene(present, where, boxes, **fields)


def images(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(number, *SHAPE, generator=generator)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The arguments that figures are made from, by the figure's name."""
    made: dict = {}
    for name in ("traversal_figure", "swap_figure", "tables_figure"):
        function = getattr(plots, name)
        monkeypatch.setattr(
            plots, name,
            lambda *given, name=name, function=function, **named: (
                made.__setitem__(name, (given, named)), function(*given, **named))[1])
    return made


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> SceneModel:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def test_every_picture_that_suits_a_model_can_be_drawn(model: SceneModel) -> None:
    names = pictures.applying(model)
    assert set(names) == NAMES | ({"templates"} if isinstance(model, DiscreteAIR) else set())
    drawn = pictures.draw(model, images(6), {name: Path(name) for name in names}, math.inf)
    assert set(drawn) == {Path(name) for name in names}
    assert all(figure.axes for figure in drawn.values())


@pytest.mark.parametrize("name", ["attributes", "no attributes", "air"])
def test_pictures_of_images_in_which_nothing_is_found(name: str) -> None:
    model = MODELS[name]().eval()
    with torch.no_grad():
        model.presence_head.bias.fill_(-20.0)
    wanted = set(pictures.applying(model)) - {"traversal", "swap"}
    drawn = pictures.draw(model, images(3), {name: Path(name) for name in wanted})
    assert all(figure.axes for figure in drawn.values())
    for name, reason in (("traversal", "no object was found"), ("swap", "two objects was found")):
        with pytest.raises(UserError, match=reason):
            pictures.PICTURES[name].draw(model, images(3), None)


def test_models_without_objects_or_categories() -> None:
    vae = ConvVAE(ConvVAEConfig(2, 2, 8), SHAPE)
    assert pictures.applying(vae) == ["inference", "samples"]
    for name in sorted(NAMES - {"inference", "samples"}):
        with pytest.raises(UserError, match="ConvVAE is a model without objects"):
            pictures.PICTURES[name].draw(vae, images(2), None)
    for name in ("air", "lavae"):
        with pytest.raises(UserError, match="without categories"):
            pictures.templates(MODELS[name](), images(2))


def test_steps_add_one_object_after_the_other(made: dict) -> None:
    one, many = [(1.5, 2.5)], [(1.5, 2.5), (5.5, 6.5), (9.5, 3.5)]
    x = images(3)
    pictures.steps(Given(scene_of([], one, many)), x)
    (rows, labels), _ = made["traversal_figure"]
    assert labels == ["input", "1 object", "2 objects", "3 objects"] and rows.shape[:2] == (4, 3)
    # Scenes with several objects come first.
    torch.testing.assert_close(rows[0], x[[2, 0, 1]])
    counts = (rows[1:] > 0).flatten(2).sum(-1)
    assert counts.tolist() == [[1, 0, 1], [2, 0, 1], [3, 0, 1]]
    assert [rows[step, 0, 0, row, column].item() for step, column, row in
            ((1, 1, 2), (2, 5, 6), (3, 9, 3))] == pytest.approx([0.1, 0.2, 0.3])


def test_steps_of_images_without_objects(made: dict) -> None:
    pictures.steps(Given(scene_of([], [])), images(2))
    (rows, labels), _ = made["traversal_figure"]
    assert labels == ["input", "1 object"] and not rows[1].any()


def test_tables_say_what_the_graph_says(made: dict) -> None:
    pose = torch.tensor([0.25, 0.25, math.pi / 6, 0, 0]).repeat(2, 3, 1)
    pose[0, 1, 2] = 2.5 * math.pi
    scene = scene_of(
        [(10, 20), (30, 20), (30, 40)], [],
        kind=torch.tensor([[4, 0, 4], [-1] * 3]), pose=pose,
        what=torch.tensor([[[1.0, 0], [4, 4], [1, 0]], [[0, 0]] * 3]),
    )
    model = Given(scene)
    model.render = lambda scene: torch.zeros(len(scene), *SHAPE)
    pictures.tables(model, images(2))
    (_, _, shown, nodes, edges), _ = made["tables_figure"]
    assert shown.counts.tolist() == [3, 0]
    assert nodes[0].columns == (
        "", "category", "attribute 0", "attribute 1", "x (px)", "y (px)", "scale", "angle")
    assert nodes[0].rows == [
        ("0", "4", "1.00", "0.00", "10.0", "20.0", "0.25", "30°"),
        ("1", "0", "4.00", "4.00", "30.0", "20.0", "0.25", "90°"),
        ("2", "4", "1.00", "0.00", "30.0", "40.0", "0.25", "30°"),
    ]
    assert edges[0].columns == (
        "", "dx (px)", "dy (px)", "direction", "same category", "attribute distance")
    assert edges[0].rows == [
        ("0 → 1", "-20.0", "0.0", "→ 0°", "no", "5.00"),
        ("0 → 2", "-20.0", "-20.0", "↘ 45°", "yes", "0.00"),
        ("1 → 2", "0.0", "-20.0", "↓ 90°", "no", "5.00"),
    ]
    assert nodes[1].rows == edges[1].rows == []

    # Without poses there are boxes; two scales, an angle that never turns and long appearances.
    plain = replace(scene, pose=None, kind=None, what=torch.zeros(2, 3, 9))
    uneven = pose * torch.tensor([1, 2, 0, 0, 0])
    columns = []
    for changed in (plain, replace(plain, pose=uneven)):
        model.scene = changed
        pictures.tables(model, images(2))
        (*_, nodes, edges), _ = made["tables_figure"]
        columns.append((nodes[0].columns, edges[0].columns))
    assert [c[0] for c in columns] == [
        ("", "x (px)", "y (px)", "width (px)", "height (px)"),
        ("", "x (px)", "y (px)", "scale x", "scale y"),
    ]
    assert columns[0][1] == ("", "dx (px)", "dy (px)", "direction", "appearance distance")


def test_templates_are_the_models(made: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["attributes"]().eval()
    pictures.templates(model, images(2))
    (rows, labels, headings), _ = made["traversal_figure"]
    assert labels == [f"category {k}, attribute {i}" for k in range(3) for i in range(2)]
    assert headings == [f"attribute {value}" for value in (-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2)]
    for row, (kind, attribute) in zip(rows, ((k, i) for k in range(3) for i in range(2))):
        what = torch.zeros(9, 2)
        what[:, attribute] = torch.linspace(-2, 2, 9)
        expected = model.templates(torch.eye(3)[[kind] * 9], what)
        torch.testing.assert_close(row, expected)

    monkeypatch.setattr(changing, "ATTRIBUTES", 1)  # of two: the one that changes them more
    with torch.no_grad():
        model.attribute.weight[:, 0] = 3 * model.attribute.weight[:, 1]
    pictures.templates(model, images(2))
    (rows, labels, _), _ = made["traversal_figure"]
    assert labels == [f"category {k}, attribute 0" for k in range(3)]
    what = torch.stack([torch.linspace(-2, 2, 9), torch.zeros(9)], 1)
    torch.testing.assert_close(rows[2], model.templates(torch.eye(3)[[2] * 9], what))

    model = MODELS["no attributes"]().eval()
    pictures.templates(model, images(2))
    (rows,), named = made["traversal_figure"]
    torch.testing.assert_close(rows, model.templates(torch.eye(3), None)[None])
    assert named == {"headings": ["category 0", "category 1", "category 2"]}


def test_a_traversal_moves_scales_turns_and_changes(
    model: SceneModel, made: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changing, "VISIBLE", 0.0)  # models are not trained
    x = images(4)
    pictures.traversal(model, x, math.inf)
    (drawn, labels, headings, outlined), _ = made["traversal_figure"]
    inferred, rows = drawn[:, 0], drawn[:, 1:]
    assert headings == ["inferred", *[""] * 9] and rows.shape[1] == 9
    places = ["x, 2.5 to 14.5 px", "y, 2.5 to 14.5 px"]
    poses = ["scaled, 0.5 to 2 times"] * (not isinstance(model, LAVAE))
    poses += ["turned, -90 to 90°"] * isinstance(model, DiscreteAIR)
    assert labels[:2 + len(poses)] == places + poses
    name = "attribute" if isinstance(model, DiscreteAIR) else "appearance"
    config = model.config
    changed = min(6, config.attributes if isinstance(model, DiscreteAIR) else config.latent)
    assert sorted(label.split()[0] for label in labels[2 + len(poses):]) == [name] * changed
    assert all(label.endswith(", -2.5 to 2.5") for label in labels[2 + len(poses):])
    scene = model.infer(x, math.inf)
    first = int(scene.counts.nonzero()[0])
    whole = model.render(scene)[first]
    torch.testing.assert_close(inferred, whole.expand_as(inferred))
    # Half way the object is as it was.
    for label in poses:
        torch.testing.assert_close(rows[labels.index(label), 4], whole)
    assert all((row[0] != row[-1]).any() for row in rows)
    slot = int(scene.present[first].int().argmax())
    assert outlined.present.nonzero().tolist() == [[0, slot]]
    torch.testing.assert_close(outlined.boxes[0, slot], scene.boxes[first, slot])
    for label in places + poses:
        for end, sign, stop in ((0, -1, 2.5), (-1, 1, 14.5)):
            where, pose = scene.where.clone(), scene.pose
            if label in places:
                where[first, slot, places.index(label)] = stop
            else:
                pose = pose.clone()
                pose[first, slot, :2] *= 2.0**sign if label.startswith("scaled") else 1.0
                pose[first, slot, 2] += sign * math.pi / 2 if label.startswith("turned") else 0.0
            drawn = model.render(replace(scene, where=where, pose=pose))[first]
            torch.testing.assert_close(rows[labels.index(label), end], drawn)


def test_a_traversal_moves_along_x_and_then_along_y(made: dict) -> None:
    """Over the middle three quarters of each side, whatever that is; other objects stay."""
    model = Given(scene_of([], [(3.5, 4.5), (15.5, 0.5)]))
    model.image_shape = (1, 8, 16)
    pictures.traversal(model, torch.zeros(2, *model.image_shape))
    (rows, labels, _, outlined), _ = made["traversal_figure"]
    assert labels == ["x, 2.5 to 14.5 px", "y, 1.5 to 7.5 px"]
    assert (rows[:, :, 0, 0, 15] == 0.2).all()
    places = [[picture[0].nonzero().tolist() for picture in (row == 0.1)] for row in rows]
    assert [row.pop(0) for row in places] == [[[4, 3]]] * 2  # as it was found
    assert outlined.boxes[outlined.present].tolist() == [[3.5, 4.5, 4, 2]]
    assert places[0] == [[[4, column]] for column in (2, 3, 5, 6, 8, 9, 11, 12, 14)]
    assert places[1] == [[[line, 3]] for line in (1, 1, 2, 3, 4, 4, 5, 6, 7)]


def test_a_traversal_skips_appearance_that_does_not_show(made: dict) -> None:
    """Dimension 0 changes all pixels by too little each; 1 to 8 one pixel each, ever less."""
    weight = torch.zeros(9, 256)
    weight[0] = 0.9 * changing.VISIBLE / 5
    weight[1:].fill_diagonal_(1).mul_(torch.linspace(0.1, 0.05, 8)[:, None])
    model = Given(scene_of([(8, 8)], what=torch.zeros(1, 1, 9)))
    model.render = lambda scene: (0.5 + scene.what[:, 0] @ weight).unflatten(-1, SHAPE)
    pictures.traversal(model, images(1))
    (_, labels, *_), _ = made["traversal_figure"]
    assert labels[2:] == [f"appearance {i}, -2.5 to 2.5" for i in range(1, 7)]
    weight[3:] = 0.0
    pictures.traversal(model, images(1))
    (_, labels, *_), _ = made["traversal_figure"]
    assert labels[2:] == ["appearance 1, -2.5 to 2.5", "appearance 2, -2.5 to 2.5"]


def test_a_swap_exchanges_categories_and_attributes(made: dict) -> None:
    kind, what = torch.tensor([[2, 5, 7]]), torch.tensor([[[2.0], [5.0], [7.0]]])
    model = Given(scene_of([(1, 1), (5, 5), (9, 9)], kind=kind, what=what))
    rendered = []
    model.render = lambda scene: (rendered.append(scene), torch.zeros(len(scene), *SHAPE))[1]
    pictures.swap(model, images(1))
    before, after = rendered
    assert before.kind.tolist() == [[2, 5, 7]] and after.kind.tolist() == [[7, 2, 5]]
    assert after.what[0, :, 0].tolist() == [7, 2, 5]
    torch.testing.assert_close(after.where, before.where)
