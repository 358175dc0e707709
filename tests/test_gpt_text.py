"""The GPT demo: an honest text, a figure that is reached, and training on the kernels."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import gpunn
from closeness import assert_accurate
from kit import as_numpy, launched


@pytest.fixture
def demo(demo_folder: Path) -> ModuleType:
    """The module; the test is skipped where its packages are missing."""
    return importlib.import_module("gpt_text")


def test_the_quick_demo_reaches_its_figure(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes as it learns, prints a trace and, last, the figure, and draws its curve."""
    from matplotlib.image import imread

    out = tmp_path / "new" / "folder"
    with gpunn.backend("torch"):
        assert demo.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(f"after {step} steps" in printed for step in (4, 16, 80))
    assert "3 × attention" in printed
    last = printed.splitlines()[-1]
    pattern = r"Held-out loss: ([\d.]+) nats a character \(expected: at most ([\d.]+)\)"
    said = re.fullmatch(pattern, last)
    assert said, last
    assert float(said[1]) <= float(said[2]) == demo.QUICK_EXPECTED
    guessed = re.search(r"guessing by characters: ([\d.]+) nats", printed)
    assert guessed
    assert float(guessed[1]) > demo.QUICK_EXPECTED, "guessing would reach the figure"
    pixels = imread(out / "learning_curve.png")
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 0.02, "the picture is blank"


def test_no_held_out_paragraph_is_trained_on(demo: ModuleType) -> None:
    text = demo.load(demo.reference(), "cpu")
    train, held_out = text.decoded(text.train), text.decoded(text.held_out)
    assert len(train) > 250_000
    assert len(held_out) == int(0.1 * (len(train) + len(held_out)))
    seen = {" ".join(paragraph.split()) for paragraph in train.split("\n\n")}
    whole = [" ".join(paragraph.split()) for paragraph in held_out.split("\n\n")[1:]]
    assert len(whole) > 100
    assert not seen & set(whole)


def test_repetitions_are_left_out_but_where_they_first_stand(demo: ModuleType) -> None:
    text = "\n\none\n  two\n\nthree\n \n\none two\n\nthree\n\nfour\n"
    assert demo.without_repetitions(text) == "one\n  two\n\nthree\n\nfour"


def test_what_guessing_loses_is_counted_by_hand(demo: ModuleType) -> None:
    """A character counts one more than it was seen, a pair n times its second's frequency more."""
    text = demo.Text("ab", torch.tensor([0, 0, 1]), torch.tensor([0, 1]))
    a, b = 3 / 5, 2 / 5
    assert demo.loss_of_guessing(text, 0) == pytest.approx(-(math.log(a) + math.log(b)) / 2)
    b_after_a = (1 + 2 * b) / (2 + 2)  # of "aa" and "ab"
    assert demo.loss_of_guessing(text, 1) == pytest.approx(-math.log(b_after_a))


def test_windows_are_followed_by_their_next_characters(demo: ModuleType) -> None:
    x, y = demo.windows_at(torch.arange(500), torch.tensor([3, 100]))
    assert x.shape == y.shape == (2, demo.CONTEXT)
    assert torch.equal(y, x + 1)
    assert x[:, 0].tolist() == [3, 100]


def narrow(demo: ModuleType, n_characters: int) -> gpunn.models.GPT:
    """A smaller network than the demo's, of the same memory."""
    torch.manual_seed(0)
    return gpunn.models.GPT(
        n_characters, demo.CONTEXT, 16, 1, 2, dropout=0.0, initializer_range=0.2
    )


def test_the_loss_is_the_mean_over_all_windows(demo: ModuleType) -> None:
    """More windows than one batch of them, whose last one is smaller."""
    text = demo.load(demo.reference(), "cpu")
    model = narrow(demo, len(text.characters))
    tokens = text.held_out[: 70 * demo.CONTEXT + 1]
    with gpunn.backend("torch"), torch.no_grad():
        windows = tokens[:-1].view(70, -1), tokens[1:].view(70, -1)
        expected = model.eval()(*windows).item()
        assert demo.loss_on(model, tokens) == pytest.approx(expected, rel=1e-5)
        some = model(windows[0][[0, 34, 69]], windows[1][[0, 34, 69]]).item()
        assert demo.loss_on(model, tokens, 3) == pytest.approx(some, rel=1e-5)
    assert model.training


def test_writing_goes_on_past_the_memory(demo: ModuleType) -> None:
    text = demo.load(demo.reference(), "cpu")
    model = narrow(demo, len(text.characters))
    with gpunn.backend("torch"), demo.threads(1):
        written, again, other = (demo.write(model, text, 40, seed) for seed in (0, 0, 1))
    assert len(written) == demo.CONTEXT // 2 + 40
    assert written.startswith(text.decoded(text.held_out[: demo.CONTEXT // 2]))
    assert written == again != other


def test_what_is_written_follows_on(demo: ModuleType) -> None:
    """Nothing is left out or repeated where the memory is read anew."""

    class Counting:
        def generate(self, prompt: torch.Tensor, n_tokens: int, **options: Any) -> torch.Tensor:
            return torch.cat([prompt, prompt[:, -1:] + 1 + torch.arange(n_tokens)], 1)

    text = demo.Text("".join(map(chr, range(32, 532))), torch.empty(0), torch.arange(200))
    assert demo.write(Counting(), text, 100, 0) == text.characters[: demo.CONTEXT // 2 + 100]


def trained(
    demo: ModuleType, device: str, dtype: torch.dtype, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of the first steps of a smaller network, and its parameters after them."""
    model = narrow(demo, 16).to(device, dtype)
    optimizer, schedule = demo.optimizer_for(model, 3)
    tokens = torch.randint(16, (400,), generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    for step in range(steps):
        x, y = demo.windows_at(tokens, torch.tensor([40 * step, 90]))
        losses.append(demo.train_step(model, optimizer, x[:, :9], y[:, :9]))
        schedule.step()
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.tensor(losses, dtype=dtype), parameters


def test_the_kernels_train_as_torch_does(demo: ModuleType, device: str) -> None:
    """Losses of three steps no further from float64's than twice torch's; all is gpunn's.

    Parameters after them as far as Adam allows, which divides gradients by their own size.
    """
    steps = 3
    with gpunn.backend("torch"):
        exact, exact_after = trained(demo, device, torch.float64, steps)
        baseline, baseline_after = trained(demo, device, torch.float32, steps)
        _, before = trained(demo, device, torch.float64, 0)
    with gpunn.trace() as trace:
        losses, after = trained(demo, device, torch.float32, steps)
    assert_accurate(losses, as_numpy(exact), baseline, "losses")
    moved, apart = (exact_after - before).norm(), (after - exact_after).norm()
    assert moved > 1e-3, "the steps changed nothing"
    assert apart <= 2 * (baseline_after - exact_after).norm() + 1e-3 * moved
    launched(
        trace, "embedding_forward", "embedding_backward", "linear_forward",
        "linear_epilogue_backward", "row_norm_forward", "row_norm_backward", "attention_forward",
        "attention_backward", "cross_entropy_with_gradient",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--text", "nowhere.txt"], "--text: .*No such file.*nowhere.txt"),
        (["--text", "/dev/null"], "--text: expected more than 640 .*, got 0 without repetitions"),
        (["--text", sys.executable], "--text: .*utf-8.* can't decode"),
        ([], r"--text: .*pydoc_data.*: give --text FILE"),
    ],
)
def test_bad_options_are_refused(
    demo: ModuleType,
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No text in UTF-8 that is long enough, and, where none is given, a Python without its own."""
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert re.search(complaint, capsys.readouterr().err)


def test_another_text_is_measured_by_guessing(demo: ModuleType, tmp_path: Path) -> None:
    """Of it no figure is known."""
    path = tmp_path / "text.txt"
    numbers = " and ".join(f"{i}" for i in range(200))
    path.write_text(numbers + "\n\nα and ω, " + numbers[::-1], encoding="utf-8")
    options = ["--text", str(path), "--steps", "1", "--device", "cpu", "--out", str(tmp_path)]
    with gpunn.backend("torch"):
        result = demo.run(demo.parse(options))
    assert result.expected == result.guessing["guessing by characters"]
