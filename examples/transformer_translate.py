"""The Transformer of "Attention is all you need" learns to translate, and shows where it looks.

    python examples/transformer_translate.py [--pair en-de] [--device auto] [--seed 0]
        [--steps N] [--out FOLDER] [--corpus FOLDER] [--quick] [--resume] [--fsdp]
    torchrun --nproc-per-node 2 examples/transformer_translate.py ...

Numbers in words, from English to German (``en-de``) or French (``en-fr``), as num2words spells
them. German compounds are taken apart, so that what is said first in one language is last in the
other: "seventy two" is "zwei und sieb zig". 500 numbers are held out and never trained on; a
translation counts as right when all of its words are. The larger setting, ``--pair en-es``, learns
from verses of two Bibles, which Debian packages (``bible_verses.py`` says how to get them); books
are held out, and translations, by beam search, compared with theirs by BLEU.

The network is ``gpunn.models.transformer_small``, the paper's with 2 + 2 layers, 4 heads and 128
channels, trained with the paper's dropout, label smoothing and batches of about one length, and
half its learning rate, which here falls to zero in the end; for verses it has 192 channels, the
whole rate, and normalises before each layer. Its attention to the source is held to a dictionary
(of verses, to Strong's concordance): for a word that can stand for one word of the source alone,
the best head, chosen by sentences that were trained on, should look there.

Every 200 steps (400 of verses) a checkpoint is written to FOLDER/checkpoints, and ``--resume`` goes
on from the last one with nothing lost: on a CPU the weights are those of a run that was not
interrupted, bit for bit. With torchrun, processes share each batch (DistributedDataParallel), or
the network, too (``--fsdp``: FSDP2), over NCCL on GPUs and gloo on CPUs.

Paper: Vaswani et al., "Attention is all you need", 2017, https://arxiv.org/abs/1706.03762.
Numbers: num2words 0.5.14, LGPL. BLEU: Post, "A call for clarity in reporting BLEU scores", 2018,
https://arxiv.org/abs/1804.08771 (sacrebleu).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import gpunn
from bible_verses import FOLDER, bible_verses
from checkpoint import CANNOT_RESUME, what_ran
from command_line import device_of, parser_for
from gpunn.models import TranslationTransformer
from loops import threads
from number_words import number_words
from processes import processes
from translation_data import Corpus, Sentences, sentence
from translation_training import MEASURED_ROWS, Options, Point, Setting, Training, train

try:
    from matplotlib.figure import Figure

    from attention_pictures import draw_lines, draw_maps
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

N_SHOWN, DRAWN_WORDS = 4, 9
N_POINTED = 500  # sentences that choose the head


@dataclass(frozen=True)
class Task:
    """What there is to learn, how, and the figures to expect."""

    corpus: Callable[[Path], Corpus]
    steps: int
    expected: float
    """Of translations: the share without a fault of numbers, BLEU of verses."""
    expected_aligned: float
    setting: Setting
    n_beams: int = 1
    by_bleu: bool = False
    """Not by translations without a fault: of a sentence there are many."""


NUMBERS = Setting(network={"dropout": 0.1})


def numbers(pair: str, expected: float) -> tuple[Task, Task]:
    """Spelt in two languages; and the quick task."""
    return (
        Task(lambda _: number_words(pair), 400, expected, 0.98, NUMBERS),
        Task(lambda _: number_words(pair, 3000, 100), 160, 0.5, 0.6, NUMBERS),
    )


VERSES = Setting(
    warm_up=400, factor=1.0, measure_every=200, save_every=400,
    network={"norm_first": True, "dropout": 0.1, "d_model": 192, "d_hidden": 512},
)  # fmt: skip
TASKS = {
    "en-de": numbers("en-de", 0.97),
    "en-fr": numbers("en-fr", 0.98),
    "en-es": (
        Task(bible_verses, 1700, 22.0, 0.5, VERSES, n_beams=4, by_bleu=True),
        Task(bible_verses, 120, 0.05, 0.05, VERSES, n_beams=4, by_bleu=True),
    ),
}


@dataclass(frozen=True)
class Result:
    """What a run found."""

    curve: list[Point]
    said: list[list[str]]
    """The translations of what was held out."""
    exact: float
    """The share of held-out sentences whose translation is right, word for word."""
    bleu: float | None
    """Of all of them, in percent, where the task is judged by it."""
    head: tuple[int, int]
    aligned: float
    """The share of unambiguous words at which this head, (layer, head), looks at the right one."""
    unambiguous: float
    """The share of held-out words that are known to stand for one word of the source alone."""
    trace: gpunn.Trace
    pictures: list[Path]


def translations(
    model: TranslationTransformer, corpus: Corpus, sentences: Sentences, n_beams: int
) -> list[list[str]]:
    """The best that a beam search finds; with one beam, the likeliest word, then the next."""
    device, found = model.output.weight.device, []
    for rows in torch.arange(len(sentences)).split(MEASURED_ROWS):
        source, target = sentences.batch(rows)
        tokens, _ = model.beam_search(source.to(device), target.shape[1] + 5, n_beams=n_beams)
        found += [corpus.target_words.decoded(row) for row in tokens.tolist()]
    return found


def bleu(said: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> float:
    """sacrebleu's, in percent, of lower-case text; a word that is not known is wrong.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"BLEU needs {error.name}: pip install 'gpunn[demo]'", name=error.name
        ) from None
    theirs, ours = (list(map(sentence, sentences)) for sentences in (truth, said))
    return float(BLEU().corpus_score(ours, [theirs]).score)


def pointing(model: TranslationTransformer, sentences: Sentences) -> tuple[torch.Tensor, float]:
    """The share of unambiguous words at which each head, (layers, heads), looks at the right one.

    And the share of unambiguous ones among the words. Row i of a map is of word i + 1.
    """
    places = [pair.places for pair in sentences.pairs]
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
    return share, n / sum(len(pair.target) for pair in sentences.pairs)


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
    lengths = [len(pair.source) for pair in corpus.held_out.pairs]
    row = min(range(len(lengths)), key=lambda i: abs(lengths[i] - DRAWN_WORDS))
    theirs, ours, _ = corpus.held_out.pairs[row]
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


def measure(
    task: Task, training: Training, model: TranslationTransformer, trace: gpunn.Trace
) -> Result:
    """Translate what was held out, find the best head, and draw."""
    corpus, options = training.corpus, training.options
    said = translations(model, corpus, corpus.held_out, task.n_beams)
    truth = [pair.target for pair in corpus.held_out.pairs]
    exact = sum(map(list.__eq__, said, truth)) / len(truth)
    seen, _ = pointing(model, corpus.train.first(N_POINTED))
    layer, head = divmod(int(seen.argmax()), seen.shape[1])
    shares, unambiguous = pointing(model, corpus.held_out)
    figures = {
        "learning_curve.png": draw_learning_curve(
            training.curve, least_loss(len(corpus.target_words), task.setting.smoothing)
        ),
        **draw_attention(model, corpus, layer),
    }
    for name, figure in figures.items():
        figure.savefig(options.out / name, dpi=100, bbox_inches="tight", pad_inches=0.15)
    return Result(
        training.curve, said, exact, bleu(said, truth) if task.by_bleu else None, (layer, head),
        float(shares[layer, head]), unambiguous, trace, [options.out / name for name in figures],
    )  # fmt: skip


def run(task: Task, options: Options, folder: Path) -> Result | None:
    """Train, translate, measure and draw; None in all processes but the first."""
    corpus = task.corpus(folder)
    if options.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 on the tensor cores
    with threads(2), processes(options.device) as (group, device):
        training, trace = train(corpus, options, device, group)
        model = training.whole()
        if not group.first:
            return None
        result = measure(task, training, model, trace)
        report(result, corpus, task, device)
        return result


def report(result: Result, corpus: Corpus, task: Task, device: torch.device) -> None:
    """Print what was found; last, the figures beside those expected."""
    for pair, said in list(zip(corpus.held_out.pairs, result.said, strict=True))[:N_SHOWN]:
        right = "right" if said == pair.target else f"wrong: {sentence(pair.target)}"
        print(f"{sentence(pair.source)} -> {sentence(said)} ({right})")
    print(what_ran(f"A training step on {device}", result.trace))
    print("Pictures:", *result.pictures)
    layer, head = result.head
    print(
        f"Head {head + 1} of layer {layer + 1} looks at the right word for {result.aligned:.1%} of "
        f"the unambiguous words (expected: at least {task.expected_aligned:.0%}), which are "
        f"{result.unambiguous:.0%} of all"
    )
    exact = f"Held-out translations without a fault: {result.exact:.1%} of {len(corpus.held_out)}"
    if result.bleu is None:
        print(f"{exact} (expected: at least {task.expected:.0%})")
    else:
        print(exact)
        print(f"BLEU of them all: {result.bleu:.1f} (expected: at least {task.expected:g})")


def parse(argv: Sequence[str] | None) -> tuple[Task, Options, Path]:
    """What a command line asks for, and the folder of its corpus."""
    default = ", ".join(f"{task.steps} for {pair}" for pair, (task, _) in TASKS.items())
    parser = parser_for(
        __doc__, "transformer_translate", seed="of everything random but the corpus",
        steps=f"mini-batches (default: {default})", quick="fewer steps, of fewer numbers",
    )  # fmt: skip
    parser.add_argument("--pair", choices=sorted(TASKS), default="en-de", help="languages")
    parser.add_argument("--corpus", type=Path, default=FOLDER, help="where en-es finds its verses")
    parser.add_argument(
        "--fsdp", action="store_true", help="with torchrun: the processes share the network"
    )
    given = parser.parse_args(argv)
    task = TASKS[given.pair][given.quick]
    if given.fsdp and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        parser.error("--fsdp: expected two processes or more, as torchrun starts them")
    options = Options(
        device=device_of(parser, given.device),
        seed=given.seed,
        steps=given.steps or task.steps,
        out=given.out,
        pair=given.pair,
        resume=given.resume,
        fsdp=given.fsdp,
        setting=task.setting,
    )
    return task, options, given.corpus


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 1, saying why, without the data or a checkpoint that can be gone on from."""
    try:
        run(*parse(argv))
    except (*CANNOT_RESUME, ModuleNotFoundError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
