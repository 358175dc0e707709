"""A corpus for tests that no package is needed for, and the smallest training on it."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import translation_data as data  # noqa: E402
import translation_training as training  # noqa: E402
from processes import Processes  # noqa: E402

NETWORK = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_hidden": 12, "dropout": 0.1}


def corpus() -> data.Corpus:
    """Digits in words, and the same backwards, in capitals; of one to four."""
    digits = "zero one two three four five six seven eight nine".split()
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i in range(44):
        words = [digits[d] for d in torch.randint(10, (1 + i % 4,), generator=generator).tolist()]
        pairs.append(data.Pair(words, [word.upper() for word in reversed(words)], {}))
    return data.Corpus.of(pairs[4:], pairs[:4])


def options(
    out: Path,
    steps: int,
    network: dict[str, Any],
    batch: int = 8,
    sorted_batches: int = 2,
    cool_down: float = 0.5,
    **others: Any,
) -> training.Options:
    """A checkpoint after every other step, a point of the curve after every fourth."""
    setting = training.Setting(
        batch=batch,
        sorted_batches=sorted_batches,
        cool_down=cool_down,
        warm_up=4,
        measure_every=4,
        save_every=2,
        network={**NETWORK, **network},
    )
    given = {
        "device": torch.device("cpu"), "seed": 3, "out": out, "pair": "en-de", "setting": setting,
    }  # fmt: skip
    return training.Options(**{**given, "steps": steps, **others})


def begun(given: training.Options) -> training.Training:
    """Before its first step, in one process."""
    return training.Training(corpus(), given, given.device, Processes())


def trained(given: training.Options) -> training.Training:
    """By one process."""
    return training.train(corpus(), given, given.device, Processes())[0]


def kill(given: training.Options, step: int, group: Processes) -> None:
    """A training that ends in the middle of this step."""
    advance = training.Training.advance

    def advance_or_die(self: training.Training) -> float:
        loss = advance(self)
        if self.step == step:
            raise KeyboardInterrupt
        return loss

    with (
        mock.patch.object(training.Training, "advance", advance_or_die),
        suppress(KeyboardInterrupt),
    ):
        training.train(corpus(), given, given.device, group)
        raise AssertionError(f"the training did not come to step {step}")


def last_gradient(found: training.Training) -> torch.Tensor:
    """Of the output layer's weight, in one piece."""
    named = dict(found.model.named_parameters())
    (gradient,) = (p.grad for name, p in named.items() if name.endswith("output.weight"))
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def train_together(out: Path, group: Processes) -> None:
    """In both ways of sharing, two processes get the curve of one with the whole batch.

    They are killed in between, so that what is shared is also saved and taken up again.
    """
    alone = trained(options(out / f"alone {group.rank}", 6, {"dropout": 0.0}))
    for fsdp in (False, True):
        given = options(out / str(fsdp), 6, {"dropout": 0.0}, fsdp=fsdp)
        kill(given, 3, group)
        given = replace(given, resume=True)
        found, _ = training.train(corpus(), given, given.device, group)
        # Not of all: the gradient of keys' bias is 0 but for rounding, which Adam divides by.
        weights = found.whole().output.weight, alone.whole().output.weight
        torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
        gradients = last_gradient(found), last_gradient(alone)  # whose size Adam does not show
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
        if group.first:
            ours = {point.step: point for point in found.curve}
            for theirs in alone.curve:
                losses = ours[theirs.step].held_out_loss, theirs.held_out_loss
                assert math.isclose(*losses, rel_tol=1e-5)
            losses = ours[6].train_loss, theirs.train_loss  # of steps 5 and 6, in both
            assert math.isclose(*losses, rel_tol=1e-5)
