"""The Transformer of "Attention is all you need" learns to translate, and shows where it looks.

    python examples/transformer_translate.py [--pair en-de] [--device auto] [--seed 0]
        [--steps 800] [--out FOLDER] [--quick] [--resume] [--fsdp]
    torchrun --nproc-per-node 2 examples/transformer_translate.py ...

Numbers in words, from English to German (``en-de``) or French (``en-fr``), as num2words spells
them. German compounds are taken apart, so that what is said first in one language is last in the
other: "seventy two" is "zwei und sieb zig". 500 numbers are held out and never trained on; a
translation counts as right when all of its words are.

The network is ``gpunn.models.transformer_small``, the paper's with 2 + 2 layers, 4 heads and 128
channels, trained with label smoothing and the paper's learning rate times 0.4. Its attention to the
source is held to a dictionary: for a word that can stand for one word of the source alone, the best
head, chosen by sentences that were trained on, should look there.

Every 200 steps a checkpoint is written to FOLDER/checkpoints, and ``--resume`` goes on from the
last one with nothing lost: on a CPU the weights are those of a run that was not interrupted, bit
for bit. With torchrun, processes share each batch (DistributedDataParallel), or the network, too
(``--fsdp``: FSDP2), over NCCL on GPUs and gloo on CPUs.

Paper: Vaswani et al., "Attention is all you need", 2017, https://arxiv.org/abs/1706.03762.
Numbers: num2words 0.5.14, LGPL.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import gpunn
from checkpoint import CANNOT_RESUME
from command_line import device_of, parser_for
from gpunn.models import TranslationTransformer
from processes import processes
from translation_data import (
    LANGUAGES,
    N_HELD_OUT,
    N_TRAIN,
    Corpus,
    Dictionary,
    Sentences,
    aligned,
    dictionary,
    number_words,
)
from translation_training import MEASURED_ROWS, Options, Point, Training, train

try:
    from matplotlib.figure import Figure

    from attention_pictures import draw_lines, draw_maps
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

STEPS, QUICK_STEPS = 800, 120
EXPECTED = {"en-de": 0.97, "en-fr": 0.98}
EXPECTED_ALIGNED = 0.97
QUICK_EXPECTED, QUICK_ALIGNED = 0.5, 0.6
QUICK_TRAIN, QUICK_HELD_OUT = 3000, 100
N_SHOWN, DRAWN_WORDS = 4, 9


@dataclass(frozen=True)
class Result:
    """What a run found."""

    curve: list[Point]
    said: list[list[str]]
    """The translations of what was held out."""
    exact: float
    """The share of held-out sentences whose translation is right, word for word."""
    head: tuple[int, int]
    aligned: float
    """The share of unambiguous words at which this head, (layer, head), looks at the right one."""
    unambiguous: float
    """The share of held-out words that can stand for one word of the source alone."""
    trace: gpunn.Trace
    pictures: list[Path]


def translations(
    model: TranslationTransformer, corpus: Corpus, sentences: Sentences
) -> list[list[str]]:
    """The likeliest word, one after the other."""
    device, found = model.output.weight.device, []
    for rows in torch.arange(len(sentences)).split(MEASURED_ROWS):
        source, target = sentences.batch(rows)
        tokens = model.translate(source.to(device), target.shape[1] + 5)
        found += [corpus.target_words.decoded(row) for row in tokens.tolist()]
    return found


def pointing(
    model: TranslationTransformer, sentences: Sentences, words: Dictionary
) -> tuple[torch.Tensor, float]:
    """The share of unambiguous words at which each head, (layers, heads), looks at the right one.

    And the share of unambiguous ones among the words. Row i of a map is of word i + 1.
    """
    places = [aligned(pair, words) for pair in sentences.pairs]
    n = sum(map(len, places))
    hits = 0
    device = model.output.weight.device
    for rows in torch.arange(len(sentences)).split(MEASURED_ROWS):
        source, target = sentences.batch(rows)
        maps = model.attention_maps(source.to(device), target[:, :-1].to(device)).cross
        best = torch.stack(maps).argmax(-1).cpu()  # (layers, sentences, heads, words)
        for i, row in enumerate(rows.tolist()):
            for word, place in places[row].items():
                hits = hits + (best[:, i, :, word] == place)
    share = torch.as_tensor(hits, dtype=torch.float64) / max(n, 1)
    return share, n / sum(len(target) for _, target in sentences.pairs)


def least_loss(n_words: int, smoothing: float) -> float:
    """The label-smoothed cross-entropy of the probabilities that it asks for: their entropy."""
    other = smoothing / n_words
    right = 1 - smoothing + other
    return -right * math.log(right) - (n_words - 1) * other * math.log(other)


def draw_learning_curve(curve: Sequence[Point], least: float) -> Figure:
    """Both losses against the step, and the least that label smoothing allows."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    steps = [point.step for point in curve]
    for name, label, colour in (
        ("train_loss", "training, with dropout", "tab:blue"),
        ("held_out_loss", "held out, without", "tab:orange"),
    ):
        losses = [getattr(point, name) for point in curve]
        axes.plot(steps, losses, color=colour, label=f"{label}: {losses[-1]:.3f} in the end")
    axes.axhline(least, color="grey", linestyle=":", label=f"the least possible: {least:.3f}")
    axes.set(
        title="A Transformer learns to translate",
        xlabel="step",
        ylabel="label-smoothed cross-entropy\n(nats a word)",
        ylim=(0, None),
        xlim=(0, steps[-1]),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_attention(model: TranslationTransformer, corpus: Corpus, layer: int) -> dict[str, Figure]:
    """Of one held-out sentence: maps of every head, and lines as in the paper's figure 5."""
    lengths = [len(theirs) for theirs, _ in corpus.held_out.pairs]
    row = min(range(len(lengths)), key=lambda i: abs(lengths[i] - DRAWN_WORDS))
    theirs, ours = corpus.held_out.pairs[row]
    source, target = corpus.held_out.batch(torch.tensor([row]))
    device = model.output.weight.device
    maps = model.attention_maps(source.to(device), target[:, :-1].to(device))
    own, _, cross = ([weights[0].cpu() for weights in layers] for layers in maps)
    sources, targets = [*theirs, "</s>"], [*ours, "</s>"]
    panels = [
        (f"the source reads itself, layer {len(own)}", own[-1], sources, sources),
        (f"each word looks at the source, layer {layer + 1}", cross[layer], targets, sources),
    ]
    return {
        "cross_attention.png": draw_maps(
            cross, targets, sources, "Where each predicted word (row) looks in the source"
        ),
        "self_attention.png": draw_maps(
            own, sources, sources, "Where each word of the source (row) looks in it"
        ),
        "attention_lines.png": draw_lines(panels, "Attention: the stronger a line, the more"),
    }


def measure(training: Training, model: TranslationTransformer, trace: gpunn.Trace) -> Result:
    """Translate what was held out, find the best head, and draw."""
    corpus, options = training.corpus, training.options
    said = translations(model, corpus, corpus.held_out)
    truth = [ours for _, ours in corpus.held_out.pairs]
    exact = sum(map(list.__eq__, said, truth)) / len(truth)
    words = dictionary(options.pair)
    seen, _ = pointing(model, corpus.train.first(N_HELD_OUT), words)
    layer, head = divmod(int(seen.argmax()), seen.shape[1])
    shares, unambiguous = pointing(model, corpus.held_out, words)
    figures = {
        "learning_curve.png": draw_learning_curve(
            training.curve, least_loss(len(corpus.target_words), options.setting.smoothing)
        ),
        **draw_attention(model, corpus, layer),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(options.out / name, dpi=100, bbox_inches="tight", pad_inches=0.15)
    return Result(
        training.curve, said, exact, (layer, head), float(shares[layer, head]), unambiguous, trace,
        [options.out / name for name in figures],
    )  # fmt: skip


def run(options: Options) -> Result | None:
    """Train, translate, measure and draw; None in all processes but the first."""
    corpus = number_words(options.pair, options.n_train, options.n_held_out)
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 on the tensor cores
    with processes(options.device) as (group, device):
        training, trace = train(corpus, options, device, group)
        model = training.whole()
        if not group.first:
            return None
        result = measure(training, model, trace)
        report(result, corpus, options)
        return result


def report(result: Result, corpus: Corpus, options: Options) -> None:
    """Print what was found; last, the figures beside those expected."""
    for (theirs, truth), said in list(zip(corpus.held_out.pairs, result.said, strict=True))[
        :N_SHOWN
    ]:
        right = "right" if said == truth else f"wrong: {' '.join(truth)}"
        print(f"{' '.join(theirs)} -> {' '.join(said)} ({right})")
    print(f"A training step on {options.device} ran:\n{result.trace}")
    print("Pictures:", *result.pictures)
    layer, head = result.head
    print(
        f"Head {head + 1} of layer {layer + 1} looks at the right word for {result.aligned:.1%} of "
        f"the unambiguous words (expected: at least {options.expected_aligned:.0%}), which are "
        f"{result.unambiguous:.0%} of all"
    )
    print(
        f"Held-out translations without a fault: {result.exact:.1%} of {len(corpus.held_out)} "
        f"(expected: at least {options.expected:.0%})"
    )


def parse(argv: Sequence[str] | None) -> Options:
    """The options of a command line."""
    parser = parser_for(
        __doc__, "transformer_translate", seed="of everything random but the numbers",
        steps=f"mini-batches (default: {STEPS})",
        quick=f"{QUICK_STEPS} steps, {QUICK_TRAIN} numbers",
    )  # fmt: skip
    parser.add_argument("--pair", choices=sorted(LANGUAGES), default="en-de", help="languages")
    parser.add_argument(
        "--fsdp", action="store_true", help="with torchrun: the processes share the network"
    )
    given = parser.parse_args(argv)
    if given.fsdp and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        parser.error("--fsdp: expected two processes or more, as torchrun starts them")
    return Options(
        device=device_of(parser, given.device),
        seed=given.seed,
        steps=given.steps or (QUICK_STEPS if given.quick else STEPS),
        out=given.out,
        pair=given.pair,
        n_train=QUICK_TRAIN if given.quick else N_TRAIN,
        n_held_out=QUICK_HELD_OUT if given.quick else N_HELD_OUT,
        expected=QUICK_EXPECTED if given.quick else EXPECTED[given.pair],
        expected_aligned=QUICK_ALIGNED if given.quick else EXPECTED_ALIGNED,
        resume=given.resume,
        fsdp=given.fsdp,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 1, saying why, without num2words or a checkpoint that can be gone on from."""
    try:
        run(parse(argv))
    except (*CANNOT_RESUME, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
