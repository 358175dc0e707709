"""The translation demo: honest data, figures that are reached, and training on the kernels."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import gpunn
from closeness import assert_accurate
from kit import as_numpy, launched

NO_NUMBERS = "no num2words: pip install 'gpunn[demo]'"
PICTURES = "learning_curve", "cross_attention", "self_attention", "attention_lines"


@pytest.fixture
def demo(demo_folder: Path) -> ModuleType:
    """The module; the test is skipped where its packages are missing."""
    return importlib.import_module("transformer_translate")


@pytest.fixture
def data(demo_folder: Path) -> ModuleType:
    return importlib.import_module("translation_data")


@pytest.fixture
def numbers(demo_folder: Path) -> ModuleType:
    return importlib.import_module("number_words")


def test_the_quick_demo_reaches_its_figures(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints translations, a trace and, last, the figures, and draws its pictures."""
    pytest.importorskip("num2words", reason=NO_NUMBERS)
    from matplotlib.image import imread

    out = tmp_path / "new" / "folder"
    _, quick = demo.TASKS["en-de"]
    with gpunn.backend("torch"):
        assert demo.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" -> ") == 4
    assert "× multihead_attention" in printed
    *_, heads, last = printed.splitlines()
    said = re.fullmatch(r"Held-out .*: ([\d.]+)% of \d+ \(expected: at least (\d+)%\)", last)
    assert said, last
    assert float(said[1]) >= float(said[2]) == 100 * quick.expected > 0
    said = re.search(r"looks at .* ([\d.]+)% of .* at least (\d+)%\), which are (\d+)%", heads)
    assert said, heads
    assert float(said[1]) >= float(said[2]) == 100 * quick.expected_aligned > 0
    assert float(said[3]) > 50, "too few words are measured"
    for name in PICTURES:
        pixels = imread(out / f"{name}.png")
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.02, f"{name} is blank"


GERMAN = {
    0: "null", 1: "eins", 16: "sech zehn", 17: "sieb zehn", 21: "ein und zwan zig", 30: "drei ßig",
    66: "sechs und sech zig", 72: "zwei und sieb zig", 101: "ein hundert eins",
    7012: "sieben tausend zwölf", 345: "drei hundert fünf und vier zig",
}  # fmt: skip


def test_german_compounds_are_taken_apart(numbers: ModuleType) -> None:
    """Into parts that, joined, are the word."""
    num2words = pytest.importorskip("num2words", reason=NO_NUMBERS).num2words
    assert {n: " ".join(numbers.spelt(n, "de")) for n in GERMAN} == GERMAN
    for number in range(7, 1_000_000, 2741):
        assert "".join(numbers.spelt(number, "de")) == num2words(number, lang="de")
    assert numbers.spelt(1_081, "fr") == "mille quatre vingt un".split()
    assert numbers.spelt(21_345, "en") == "twenty one thousand three hundred and forty five".split()


def test_no_held_out_number_is_trained_on(data: ModuleType, numbers: ModuleType) -> None:
    """The numbers are the same each time, of all lengths, and every held-out word is known."""
    pytest.importorskip("num2words", reason=NO_NUMBERS)
    corpus = numbers.number_words("en-de", 1500)
    held_out, train = (
        {" ".join(pair.source) for pair in part.pairs} for part in (corpus.held_out, corpus.train)
    )
    assert (len(held_out), len(train)) == (500, 1500)
    assert not held_out & train
    assert sum("thousand" not in words for words in held_out) > 100
    assert data.UNKNOWN not in corpus.held_out.source
    assert torch.equal(numbers.number_words("en-de", 1500).train.target, corpus.train.target)


ALIGNED = [
    ("en-de", "two hundred and eighty five", "zwei hundert fünf und acht zig", "00 11 24 43"),
    ("en-de", "forty two thousand and two", "zwei und vier zig tausend zwei", "20 42"),
    ("en-fr", "seventy two thousand", "soixante douze mille", "00 22"),
    ("en-fr", "two hundred and eighty one", "deux cent quatre vingt un", "00 23 33 44"),
    ("en-fr", "two hundred and ninety seven", "deux cent quatre vingt dix sept", "00 11 23 33 54"),
]


@pytest.mark.parametrize(("pair", "source", "target", "places"), ALIGNED)
def test_which_words_stand_for_which(
    numbers: ModuleType, pair: str, source: str, target: str, places: str
) -> None:
    """By hand; a word that can stand for two of the source is left out, and so is "und".

    Places are a digit for the word and one for the word of the source.
    """
    pytest.importorskip("num2words", reason=NO_NUMBERS)
    words = numbers.dictionary(pair)
    found = numbers.aligned(source.split(), target.split(), words)
    assert " ".join(f"{i}{j}" for i, j in sorted(found.items())) == places


def test_words_become_numbers_and_words_again(data: ModuleType) -> None:
    """Rare ones are unknown; sentences have their end, targets their start, and are padded."""
    train = [data.Pair(["a", "b", "a"], ["x"], {}), data.Pair(["a"], ["y", "x"], {})]
    held_out = [data.Pair(["a", "c"], ["x", "z"], {})]
    corpus = data.Corpus.of(train, held_out, at_least=2)
    assert corpus.source_words.words == ["<pad>", "<s>", "</s>", "<unk>", "a"]
    assert corpus.train.source.tolist() == [[4, 3, 4, 2], [4, 2, 0, 0]]
    assert corpus.train.target.tolist() == [[1, 4, 2, 0], [1, 3, 4, 2]]
    assert corpus.held_out.source.tolist() == [[4, 3, 2]]
    source, target = corpus.train.batch(torch.tensor([1]))
    assert (source.tolist(), target.tolist()) == ([[4, 2]], [[1, 3, 4, 2]])
    words = corpus.target_words
    assert words.decoded([1, 4, 3, 2, 4]) == ["x", "<unk>"]
    assert words.decoded([4, 0]) == ["x"]


def test_sentences_are_written_as_in_a_book(data: ModuleType, demo: ModuleType) -> None:
    words = "¿ quién dijo ( y á <unk> ) : ven , y verás ?".split()
    assert data.sentence(words) == "¿quién dijo (y á ⁇): ven, y verás?"
    pytest.importorskip("sacrebleu", reason="no sacrebleu: pip install 'gpunn[demo]'")
    unknown = [word if word != "<unk>" else "moisés" for word in words]
    assert demo.bleu([words], [words]) == pytest.approx(100)
    assert 50 < demo.bleu([words], [unknown]) < 95
    assert demo.bleu([["nada"]], [words]) < 1


def test_lengths_sort_by_source_and_then_by_target(data: ModuleType) -> None:
    sizes = [(2, 1), (1, 3), (1, 1), (2, 3), (3, 1)]
    pairs = [data.Pair(["a"] * source, ["b"] * target, {}) for source, target in sizes]
    order = data.Corpus.of(pairs, pairs).train.lengths.argsort().tolist()
    assert [sizes[i] for i in order] == sorted(sizes)


def test_every_sentence_is_read_once_a_pass(demo: ModuleType, tmp_path: Path) -> None:
    """In orders that differ from pass to pass and from seed to seed."""
    small = importlib.import_module("small_translation")

    def passes(seed: int) -> list[list[int]]:
        given = small.options(tmp_path, 1, {}, seed=seed)
        training = small.begun(given)
        found = []
        for epoch in range(2):
            rows = []
            for i in range(5):
                training.step = 5 * epoch + i
                rows += training.rows().tolist()
            found.append(rows)
        return found

    first, other = passes(0), passes(1)
    assert all(sorted(rows) == list(range(40)) for rows in (*first, *other))
    assert len({str(rows) for rows in (*first, *other)}) == 4
    assert first == passes(0)


def test_batches_are_of_about_one_length(demo: ModuleType, tmp_path: Path) -> None:
    """Sorted among so many batches; those come in no order."""
    small = importlib.import_module("small_translation")

    def lengths(sorted_batches: int) -> torch.Tensor:
        given = small.options(tmp_path, 1, {}, sorted_batches=sorted_batches)
        training = small.begun(given)
        found = []
        for training.step in range(5):
            source, _ = training.corpus.train.batch(training.rows())
            found.append((source != 0).sum(1).tolist())
        return torch.tensor(found)

    drawn, divided = lengths(1), lengths(5)
    assert drawn.sum() == divided.sum()
    assert drawn.amax(1).sum() > divided.amax(1).sum() > 0
    assert ((divided.amax(1) - divided.amin(1)) <= 1).all()
    assert (divided.amax(1).diff() < 0).any(), "from short to long"


def test_the_rate_falls_to_zero_in_the_end(demo: ModuleType, tmp_path: Path) -> None:
    small = importlib.import_module("small_translation")

    def rates(cool_down: float) -> torch.Tensor:
        given = small.options(tmp_path, 8, {}, cool_down=cool_down)
        training = small.begun(given)
        found = []
        for training.step in range(8):
            found.append(training.rate())
        return torch.tensor(found)

    papers = rates(0.0)
    setting = small.options(tmp_path, 8, {}).setting
    expected = [gpunn.models.noam_rate(n, 16, setting.warm_up, setting.factor) for n in range(1, 9)]
    torch.testing.assert_close(papers, torch.tensor(expected))
    share = torch.tensor([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    torch.testing.assert_close(rates(0.5) / papers, share)


def trained(device: str, dtype: torch.dtype, out: Path, steps: int) -> tuple[Any, torch.Tensor]:
    """The losses of the first steps of a small network without dropout, and its parameters."""
    small = importlib.import_module("small_translation")
    given = small.options(out, steps, {"dropout": 0.0}, batch=4)
    training = small.begun(replace(given, device=torch.device(device)))
    training.model.to(dtype)
    losses = [training.advance() for _ in range(steps)]
    parameters = torch.cat([p.detach().flatten() for p in training.model.parameters()])
    return torch.tensor(losses, dtype=dtype), parameters


def test_the_kernels_train_as_torch_does(demo: ModuleType, device: str, tmp_path: Path) -> None:
    """Losses of three steps no further from float64's than twice torch's; all is gpunn's.

    Parameters after them as far as Adam allows, which divides gradients by their own size.
    """
    steps = 3
    with gpunn.backend("torch"):
        exact, exact_after = trained(device, torch.float64, tmp_path, steps)
        baseline, baseline_after = trained(device, torch.float32, tmp_path, steps)
        _, before = trained(device, torch.float64, tmp_path, 0)
    with gpunn.trace() as trace:
        losses, after = trained(device, torch.float32, tmp_path, steps)
    assert_accurate(losses, as_numpy(exact), baseline, "losses")
    moved, apart = (exact_after - before).norm(), (after - exact_after).norm()
    assert moved > 1e-2, "the steps changed nothing"
    assert apart <= 2 * (baseline_after - exact_after).norm() + 1e-3 * moved
    launched(
        trace, "embedding_forward", "linear_forward", "row_norm_forward", "row_norm_backward",
        "attention_forward", "attention_backward", "cross_entropy_with_gradient",
    )  # fmt: skip


def test_the_least_loss_is_what_the_loss_of_the_best_logits_is(demo: ModuleType) -> None:
    wanted = torch.full((7,), 0.1 / 7, dtype=torch.float64)
    wanted[3] += 0.9
    loss = torch.nn.functional.cross_entropy(
        wanted.log()[None], torch.tensor([3]), label_smoothing=0.1
    )
    assert demo.least_loss(7, 0.1) == pytest.approx(loss.item())


def test_heads_are_held_to_known_places(demo: ModuleType, data: ModuleType) -> None:
    """Two words a sentence; of the two heads, one looks straight and one crosswise."""

    def of(*places: dict[int, int]) -> Any:
        pairs = [data.Pair(["a", "b"], ["A", "B"], place) for place in places]
        return data.Corpus.of(pairs, pairs).held_out

    class Fake:
        output = torch.nn.Linear(1, 1)

        def attention_maps(self, source: torch.Tensor, target: torch.Tensor) -> Any:
            straight = torch.eye(3)[None].expand(len(source), 3, 3)
            maps = torch.stack([straight, straight[:, [1, 0, 2]]], 1)
            return gpunn.models.AttentionMaps([], [], [maps])

    shares, unambiguous = demo.pointing(Fake(), of({0: 0, 1: 1}, {0: 0, 1: 1}))
    assert (shares.tolist(), unambiguous) == ([[1.0, 0.0]], 1)
    shares, unambiguous = demo.pointing(Fake(), of({0: 0}, {1: 0}))
    assert (shares.tolist(), unambiguous) == ([[0.5, 0.5]], 0.5)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--fsdp"], "--fsdp: expected two processes or more"),
        (["--pair", "en-tlh"], "--pair: invalid choice: 'en-tlh'"),
    ],
)
def test_bad_options_are_refused(
    demo: ModuleType, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert complaint in capsys.readouterr().err


def test_a_missing_package_is_named(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "num2words", None)
    importlib.import_module("number_words").speller.cache_clear()
    assert demo.main(["--device", "cpu"]) == 1
    assert re.search(r"need num2words.*pip install 'gpunn\[demo\]'", capsys.readouterr().err)


def test_damaged_checkpoints_end_the_demo_with_a_message(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    small = importlib.import_module("small_translation")
    task = replace(demo.TASKS["en-de"][0], corpus=lambda _: small.corpus())
    monkeypatch.setitem(demo.TASKS, "en-de", (task, task))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-000001.pt").write_bytes(b"nothing")
    with gpunn.backend("torch"):
        given = ["--device", "cpu", "--resume", "--out", str(tmp_path)]
        assert demo.main(given) == 1
    assert "checkpoint-000001.pt is damaged" in capsys.readouterr().err
