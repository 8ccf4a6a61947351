"""A training step of our AIR beside one of Pyro's own example, which a folder elsewhere holds.

Both see the same images, with T, the window, z_what and sigma of our preset; the rest of theirs is
set as the command line in Pyro's tutorial on AIR has it, or else its defaults, as far as it
concerns a step: encoder, decoder, predictor and baseline each with a layer of 200 units, LSTMs
of 256, masks, baselines, one optimiser a parameter. Where it differs from that command line it is
to their advantage: the batch is their whole data set, and Pyro's checks are off, as in our
training.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyro
import pyro.infer
import pyro.optim
import torch
from torch import Tensor

from pyro_scenes.bench.late import Late
from pyro_scenes.config import make_config
from pyro_scenes.data import make
from pyro_scenes.errors import UserError
from pyro_scenes.models.air import AIR, AIRConfig
from pyro_scenes.objectives.air import AIRObjective
from pyro_scenes.objectives.base import temporarily

SIDE, STEPS = 50, 3  # pixels of an image; T
DATA = "multi-mnist"  # whose windows and priors ours has, as theirs
IMAGES = "multi-sprites"  # what images show costs nothing, and these need no MNIST
FILES = ("air", "modules")  # of Pyro's example
THEIRS = "Pyro's AIR"
# names of contestants, by preset
OURS = {"fast": "our AIR, fast", "paper": "our AIR, paper"}


class Ours(Late):
    """Our AIR so late."""

    def __init__(self, preset: str, x: Tensor):
        config = make_config("air", DATA, preset, [f"max_objects={STEPS}"])
        torch.manual_seed(config.seed)
        self.net = config.net
        model = AIR(config.net, (x.shape[1], x.shape[2], x.shape[3])).to(x.device).train()
        objective = AIRObjective(config.schedule, model, config.train.steps)
        super().__init__(config.train, model, objective, x)


class Theirs:
    """Pyro's AIR, its optimiser and one batch.

    :param kind: the class, see `load`. :param x: (B, 1, H, H). :param net: the sizes to share.
    :raises UserError: if it does not take the settings of Pyro's.
    """

    def __init__(self, kind: type, x: Tensor, net: AIRConfig):
        self.x = x.squeeze(1)
        torch.manual_seed(0)
        try:
            self.air = kind(
                num_steps=net.max_objects, x_size=x.shape[-1], window_size=net.window,
                z_what_size=net.latent, likelihood_sd=net.sigma, rnn_hidden_size=256,
                encoder_net=[200], decoder_net=[200], predict_net=[200], bl_predict_net=[200],
                decoder_output_bias=-2.0, decoder_output_use_sigmoid=True, scale_prior_sd=0.2,
                use_masking=True, use_baselines=True, use_cuda=x.is_cuda,
            )  # fmt: skip
            model, guide = self.air.model, self.air.guide
        except (TypeError, AttributeError) as error:
            raise UserError(f"the AIR of --pyro-air is not Pyro's: {error}") from error
        adam = pyro.optim.Adam(lambda name: {"lr": 0.1 if name.startswith("bl_") else 1e-4})
        self.svi = pyro.infer.SVI(model, guide, adam, pyro.infer.TraceGraph_ELBO())
        self.more = continuing(0.01, net.max_objects)

    def step(self) -> None:
        self.svi.step(self.x, batch_size=len(self.x), z_pres_prior_p=self.more.__getitem__)


def continuing(ratio: float, limit: int) -> list[float]:
    """p(z_pres_t = 1 given t objects before), if p(n) is in proportion to ``ratio ** n``."""
    masses = [ratio**n for n in range(limit + 1)]
    return [sum(masses[t + 1 :]) / sum(masses[t:]) for t in range(limit)]


def load(folder: Path) -> type:
    """The class AIR of a folder like Pyro's `examples/air`; leaves no trace of the import.

    :raises UserError: if the folder is not like it.
    """
    for name in FILES:
        if not (folder / f"{name}.py").is_file():
            raise UserError(
                f"{folder} has no {name}.py: --pyro-air takes examples/air of a checkout of Pyro"
            )
    before = {name: sys.modules.pop(name) for name in FILES if name in sys.modules}
    try:
        with temporarily(sys, path=[str(folder), *sys.path], dont_write_bytecode=True):
            importlib.invalidate_caches()
            return importlib.import_module(FILES[0]).AIR
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}/air.py gives no AIR ({reason})") from error
    finally:
        for name in FILES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def contestants(
    kind: type, batch: int, device: torch.device
) -> Mapping[str, tuple[Callable[[], object], int]]:
    """What takes turns in the benchmark, theirs first: by name, the step and its images."""
    edge = slice(7, 7 + SIDE)  # of 64 pixels
    x = make(IMAGES, batch, segmentation=False).batch()[..., edge, edge].contiguous().to(device)
    ours = {name: Ours(preset, x) for preset, name in OURS.items()}
    theirs = Theirs(kind, x, ours[OURS["paper"]].net)
    return {name: (trainer.step, batch) for name, trainer in ({THEIRS: theirs} | ours).items()}


@contextmanager
def apart() -> Iterator[None]:
    """Where theirs may step: with an empty store of parameters, and unheard."""
    with pyro.get_param_store().scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
