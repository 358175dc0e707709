"""How ``transformer_translate.py`` trains: steps, learning curve, and what a checkpoint holds."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import gpunn
import gpunn.functional as GF
from checkpoint import Checkpoints, generator_states, go_on, save, set_generator_states
from gpunn.models import TranslationTransformer, noam_rate, transformer_small
from loops import progress_bar
from processes import Processes, set_state, state_of, whole
from translation_data import PADDING, Corpus, Sentences

MEASURED_ROWS = 250  # sentences at a time


@dataclass(frozen=True)
class Setting:
    """How a corpus is learnt."""

    batch: int = 64
    sorted_batches: int = 16
    """So many batches at a time are drawn, then divided by length, which leaves less padding."""
    warm_up: int = 200
    factor: float = 0.5
    cool_down: float = 0.75
    """The share of the steps, the last ones, in which the paper's rate falls on to zero."""
    smoothing: float = 0.1
    measure_every: int = 50
    save_every: int = 200
    network: dict[str, Any] = field(default_factory=dict)
    """``TranslationTransformer``'s arguments, where they are not ``transformer_small``'s."""


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    device: torch.device
    seed: int
    steps: int
    out: Path
    pair: str
    resume: bool = False
    fsdp: bool = False
    setting: Setting = Setting()


@dataclass(frozen=True)
class Point:
    """A point of the learning curve; the training loss is of the steps since the one before."""

    step: int
    train_loss: float
    held_out_loss: float


def loss_of(
    model: torch.nn.Module, source: torch.Tensor, target: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """The sum over words of the cross-entropy, with label smoothing."""
    logits = model(source, target[:, :-1])
    wanted = target[:, 1:].flatten()
    loss: torch.Tensor = GF.cross_entropy(
        logits.flatten(0, 1), wanted, reduction="sum", ignore_index=PADDING,
        label_smoothing=smoothing,
    )  # fmt: skip
    return loss


class Training:
    """A network, its optimiser and the place in the data; all that a checkpoint holds."""

    def __init__(
        self, corpus: Corpus, options: Options, device: torch.device, group: Processes
    ) -> None:
        self.corpus, self.options, self.group = corpus, options, group
        self.device = device
        torch.manual_seed(options.seed)
        self.model = group.share(self.build().to(device), options.fsdp)
        # The learning rate is the schedule's alone.
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1.0, betas=(0.9, 0.98), eps=1e-9)
        torch.manual_seed(options.seed * group.size + group.rank)  # dropout differs
        self.step = 0
        self.losses: list[float] = []
        self.curve: list[Point] = []

    def build(self) -> TranslationTransformer:
        """A new network for the corpus."""
        sizes = len(self.corpus.source_words), len(self.corpus.target_words)
        return transformer_small(*sizes, **self.options.setting.network)

    def rows(self) -> torch.Tensor:
        """The next batch: sentences of about one length, and none twice in a pass."""
        setting, train = self.options.setting, self.corpus.train
        n_batches = len(train) // setting.batch
        epoch, place = divmod(self.step, n_batches)
        generator = torch.Generator().manual_seed(1_000_003 * self.options.seed + epoch)
        drawn = torch.randperm(len(train), generator=generator)[: n_batches * setting.batch]
        parts = drawn.split(setting.sorted_batches * setting.batch)
        ordered = torch.cat([rows[train.lengths[rows].argsort(stable=True)] for rows in parts])
        batches = torch.randperm(n_batches, generator=generator)
        return ordered.view(n_batches, setting.batch)[batches[place]]

    def rate(self) -> float:
        """The learning rate of the next step."""
        setting, steps = self.options.setting, self.options.steps
        rate = noam_rate(self.step + 1, self.width, setting.warm_up, setting.factor)
        return rate * min(1.0, (steps - self.step) / max(setting.cool_down * steps, 1))

    def advance(self) -> float:
        """One step; the mean loss of a word before it, over the whole batch."""
        setting, group = self.options.setting, self.group
        source, target = self.corpus.train.batch(self.rows())
        n_words = int((target[:, 1:] != PADDING).sum())
        source, target = (group.part(tokens).to(self.device) for tokens in (source, target))
        loss = loss_of(self.model, source, target, setting.smoothing) / n_words
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.rate()
        self.optimizer.zero_grad()
        (loss * group.size).backward()  # gradients are the mean over the processes
        self.optimizer.step()
        self.step += 1
        self.losses.append(group.total(loss.detach()).item())
        return self.losses[-1]

    @property
    def width(self) -> int:
        """d_model."""
        return int(self.options.setting.network.get("d_model", 128))

    def measure(self) -> None:
        """Add a point to the curve."""
        model = self.whole()
        if self.group.first:
            held_out = loss_on(model, self.corpus.held_out, self.options.setting.smoothing)
            losses = self.losses or [float("nan")]
            self.curve.append(Point(self.step, sum(losses) / len(losses), held_out))
        self.losses = []

    def whole(self) -> TranslationTransformer:
        """The network in one piece."""
        model: TranslationTransformer = whole(self.model, self.build)
        return model

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        return {
            **state_of(self.model, self.optimizer),
            "step": self.step,
            "losses": self.losses,
            "curve": [[p.step, p.train_loss, p.held_out_loss] for p in self.curve],
            "generators": self.group.gathered(generator_states()),
        }

    def chosen(self) -> dict[str, Any]:
        """What has to be the same in a run that goes on."""
        options = self.options
        return {
            "pair": options.pair, "seed": options.seed, "processes": self.group.size,
            "steps": options.steps, "sentences": len(self.corpus.train), **asdict(options.setting),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        set_state(self.model, self.optimizer, state)
        self.step, self.losses = state["step"], list(state["losses"])
        self.curve = [Point(int(step), *losses) for step, *losses in state["curve"]]
        set_generator_states(state["generators"][self.group.rank])


@torch.no_grad()
def loss_on(model: TranslationTransformer, sentences: Sentences, smoothing: float) -> float:
    """The mean loss of a word, without dropout."""
    device, total, n_words = model.output.weight.device, 0.0, 0
    model.eval()
    for rows in torch.arange(len(sentences)).split(MEASURED_ROWS):
        source, target = sentences.batch(rows)
        total += loss_of(model, source.to(device), target.to(device), smoothing).item()
        n_words += int((target[:, 1:] != PADDING).sum())
    model.train()
    return total / n_words


def train(
    corpus: Corpus, options: Options, device: torch.device, group: Processes
) -> tuple[Training, gpunn.Trace]:
    """A whole training, or the rest of one, and the trace of its first step."""
    setting, training = options.setting, Training(corpus, options, device, group)
    checkpoints, trace = Checkpoints(options.out / "checkpoints"), None
    if options.resume:
        go_on(training, checkpoints, group)
    if not training.curve:
        training.measure()
    bar: Any = progress_bar() if group.first else nullcontext()
    with bar as progress:
        task = progress and progress.add_task("", total=options.steps, loss=math.nan)
        while training.step < options.steps:
            if trace is None:
                with gpunn.trace() as trace:
                    loss = training.advance()
            else:
                loss = training.advance()
            if progress is not None:
                progress.update(task, completed=training.step, loss=loss)
            last = training.step == options.steps
            if training.step % setting.measure_every == 0 or last:
                training.measure()
            if training.step % setting.save_every == 0 or last:
                save(training, checkpoints, group)
    return training, trace or gpunn.Trace()
