"""Games of ``examples/gan.py`` for tests: networks that are small enough for the interpreter."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import gan_judge as judge  # noqa: E402
import gan_networks as networks  # noqa: E402
import gan_training as training  # noqa: E402
from checkpoint import Checkpoints, go_on, save  # noqa: E402
from processes import Processes  # noqa: E402


class Small(NamedTuple):
    """Networks' kind and sizes (of D without its dropout), and the kernels that they need."""

    kind: str
    generator: tuple[int, int]
    discriminator: tuple[Any, ...]
    kernels: tuple[str, ...]


DENSE = "linear_forward", "batch_norm_forward"
CONVOLUTIONS = "conv_transpose_forward", "conv_forward", "batch_norm_forward"
SMALL = {
    "mlp": Small("dense", (4, 8), (8,), DENSE),
    "minimax": Small("dense", (4, 8), (8,), DENSE),
    "dcgan": Small("convolutional", (4, 2), (2, True), CONVOLUTIONS),
    "wgan-gp": Small("convolutional", (4, 2), (2, False), CONVOLUTIONS),
}


def setting(name: str, dropout_p: float, changes: dict[str, Any]) -> training.Setting:
    """A setting with its small networks, whose D has one step for one of G."""
    small = SMALL[name]
    generator = getattr(networks, f"{small.kind}_generator")
    discriminator = getattr(networks, f"{small.kind}_discriminator")
    sizes = (*small.discriminator, dropout_p) if small.kind == "dense" else small.discriminator
    of_it: dict[str, Any] = {
        "generator": lambda size: generator(size, *small.generator),
        "discriminator": lambda size: discriminator(size, *sizes),
        "latent": 4, "batch": 4, "n_critic": 1,
    }  # fmt: skip
    return dataclasses.replace(training.SETTINGS[name], **(of_it | changes))


def game_of(
    name: str,
    device: str = "cpu",
    seed: int = 0,
    steps: int = 10,
    dropout_p: float = 0.0,
    group: Processes = Processes(),  # noqa: B008 (it is frozen)
    **changes: Any,
) -> training.Training:
    """A training that has not begun."""
    return training.Training(
        setting(name, dropout_p, changes), judge.small_digits(), torch.device(device), seed, steps,
        group,
    )  # fmt: skip


class Reader(judge.Judge):
    """A judge that knows nothing, and answers each image by its pixels."""

    def __init__(self) -> None:
        pass

    def probabilities(self, x: torch.Tensor) -> NDArray[np.float64]:
        answer: NDArray[np.float64] = (
            x.flatten(1)[:, 20:30].double().mul(10).softmax(1).cpu().numpy()
        )
        return answer


def found(game: training.Training) -> dict[str, Any]:
    """What a game makes of the next batch, and the one after."""
    losses = game.advance()
    networks = {"generator": game.generator, "discriminator": game.discriminator}
    return {
        "weights": {
            f"{name}, {of_it}": weight.detach()
            for name, model in networks.items()
            for of_it, weight in model.named_parameters()
        },
        "mine": torch.stack([losses.discriminator, losses.generator]),
        "means": torch.tensor(game.means()),
        "batch": game.batch(),
    }


def train_together(out: Path, group: Processes) -> None:
    """Two processes have the same weights, and each its own half of a batch.

    Also where they go on from a checkpoint, and as if nothing was.
    """
    game = game_of("wgan-gp", group=group)
    game.advance()
    game.means()
    save(game, Checkpoints(out), group)
    uninterrupted = found(game)
    game = game_of("wgan-gp", group=group)
    go_on(game, Checkpoints(out), group)
    resumed = found(game)
    for name in ("mine", "batch"):
        torch.testing.assert_close(resumed[name], uninterrupted[name], rtol=0, atol=0)
    for ours, theirs in map(group.gathered, (uninterrupted, resumed)):
        torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=0, atol=0)
        torch.testing.assert_close(ours["means"], (ours["mine"] + theirs["mine"]) / 2)
        torch.testing.assert_close(theirs["means"], ours["means"])
        assert ours["batch"].shape == theirs["batch"].shape == (2, 1, 8, 8)
        assert not torch.equal(ours["batch"], theirs["batch"])
