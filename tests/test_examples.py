"""The demos: each can be run and called, reaches its figure, draws its pictures, on the kernels."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gpunn
from closeness import assert_accurate
from kit import as_numpy, launched

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SHARED = (
    "attention_pictures", "bible_verses", "checkpoint", "command_line", "feature_networks",
    "gan_judge", "gan_networks", "gan_pictures", "gan_training", "image_optimisation", "loops",
    "number_words", "photographs", "processes", "translation_data", "translation_training",
)  # fmt: skip
DEMOS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem not in SHARED)
PACKAGES = ("sklearn", "matplotlib", "rich")
PICTURES = ("learning_curve.png", "confusion_matrix.png", "wrong_answers.png")


@pytest.fixture(autouse=True)
def _in_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demos import what they share as scripts do, from their own folder."""
    monkeypatch.syspath_prepend(EXAMPLES)


def demo(name: str) -> ModuleType:
    """The module; the test is skipped where its packages are missing."""
    for package in PACKAGES:
        pytest.importorskip(package, reason=f"no {package}: pip install 'gpunn[demo]'")
    return importlib.import_module(name)


@pytest.fixture
def digits_mlp() -> ModuleType:
    return demo("digits_mlp")


def assert_shows_something(picture: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(picture)
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 0.02, "the picture is blank"


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_a_demo_can_be_run_and_called(path: Path) -> None:
    """Its docstring says what it does, ``main`` takes the command line and returns a status."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    signatures = [
        f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.returns is not None
    ]
    assert "main(argv: Sequence[str] | None=None) -> int" in signatures
    guards = [node for node in tree.body if isinstance(node, ast.If)]
    assert "if __name__ == '__main__':\n    raise SystemExit(main())" in map(ast.unparse, guards)


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_all_demos_take_the_same_options(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that ``gpunn demo all`` can pass them on; numbers are numbers."""
    main = demo(path.stem).main
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = re.findall(r"^  (--[a-z]+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert {"--device", "--seed", "--steps", "--out", "--quick", "--resume"} <= set(shown)
    for wrong in (["--steps", "0"], ["--steps", "few"], ["--seed", "any"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert f"argument {wrong[0]}: " in capsys.readouterr().err


def test_the_quick_demo_as_a_user_runs_it(digits_mlp: ModuleType, tmp_path: Path) -> None:
    """On a CPU, without the interpreter: PyTorch's ops, and the trace says so."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    script: list[str | Path] = [sys.executable, EXAMPLES / "digits_mlp.py"]
    done = subprocess.run(
        [*script, "--quick", "--device", "cpu", "--out", tmp_path / "new" / "folder"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 × linear  torch  cpu tensor, and TRITON_INTERPRET is not 1" in done.stdout
    last = done.stdout.splitlines()[-1]
    said = re.fullmatch(r"Held-out accuracy: ([\d.]+)% \(expected: at least ([\d.]+)%\)", last)
    assert said, last
    assert float(said[1]) >= float(said[2]) == 100 * digits_mlp.QUICK_EXPECTED
    for name in PICTURES:
        assert_shows_something(tmp_path / "new" / "folder" / name)


def test_the_digits_are_learnt(digits_mlp: ModuleType, tmp_path: Path) -> None:
    """The whole demo reaches 97 % on images that it never saw, and its curve tells the story."""
    with gpunn.backend("torch"):
        result = digits_mlp.run(digits_mlp.parse(["--device", "cpu", "--out", str(tmp_path)]))
    assert result.accuracy >= digits_mlp.EXPECTED == 0.97
    first, last = result.curve[0], result.curve[-1]
    assert (first.step, last.step) == (0, digits_mlp.STEPS)
    assert first.train_accuracy < 0.3
    assert last.train_loss < 0.01 < 0.05 < last.held_out_loss < first.held_out_loss / 5
    assert not result.trace.launches
    assert {record.reason for record in result.trace.fallbacks} == {"backend('torch')"}
    assert [path.name for path in result.pictures] == list(PICTURES)


def test_no_held_out_image_is_trained_on(digits_mlp: ModuleType) -> None:
    digits = digits_mlp.load("cpu")
    assert (len(digits.train_x), len(digits.held_out_x)) == (1347, 450)
    assert digits.train_x.mean().abs() < 1e-6
    assert (digits.train_x.std() - 1).abs() < 1e-6
    share = digits.train_y.bincount() / digits.held_out_y.bincount()
    assert share.min() > 2.8
    assert share.max() < 3.2
    seen = set(map(tuple, digits.train_x.tolist()))
    assert not seen & set(map(tuple, digits.held_out_x.tolist()))


def trained(
    digits_mlp: ModuleType, device: str, dtype: torch.dtype, steps: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The losses of the first training steps and the parameters after them, without dropout."""
    digits = digits_mlp.load(device)
    torch.manual_seed(0)
    model = digits_mlp.build(dropout_p=0.0).to(device, dtype)
    optimizer = digits_mlp.optimizer_for(model)
    order = digits_mlp.batches(len(digits.train_x), 0)
    losses = [
        digits_mlp.train_step(
            model, optimizer, digits.train_x[batch].to(dtype), digits.train_y[batch]
        )
        for batch, _ in zip(order, range(steps), strict=False)
    ]
    return torch.tensor(losses, dtype=dtype), [p.detach() for p in model.parameters()]


def test_the_kernels_train_as_torch_does(digits_mlp: ModuleType, device: str) -> None:
    """Losses and weights after three steps on the kernels: no further from float64 than torch's."""
    steps = 3
    with gpunn.backend("torch"):
        exact_losses, exact_weights = trained(digits_mlp, device, torch.float64, steps)
        torch_losses, torch_weights = trained(digits_mlp, device, torch.float32, steps)
        _, initial_weights = trained(digits_mlp, device, torch.float32, 0)
    with gpunn.backend("kernels"), gpunn.trace() as trace:
        losses, weights = trained(digits_mlp, device, torch.float32, steps)
    assert_accurate(losses, as_numpy(exact_losses), torch_losses, "losses")
    for got, exact, baseline, initial in zip(
        weights, exact_weights, torch_weights, initial_weights, strict=True
    ):
        assert (exact - initial).abs().max() > 1e-3, "the steps changed nothing"
        assert_accurate(got, as_numpy(exact), baseline, "weights")
    assert not trace.fallbacks
    operators = [record.operator for record in trace.launches]
    assert operators.count("linear_forward") >= 3 * steps  # one a layer, more where split
    assert operators.count("linear_weight_gradient") >= 3 * steps
    assert operators.count("linear_input_gradient") >= 2 * steps  # the images need none


def test_an_edge_filter_finds_the_edges_of_a_photograph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole of it by torch, and shown; a part of it by the kernel. Both are scipy's edges."""
    edges = demo("edges")
    with gpunn.backend("torch"):
        assert edges.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    said = re.search(r"difference from scipy: (\S+) \(", capsys.readouterr().out)
    assert said
    assert float(said[1]) <= edges.EXPECTED
    assert_shows_something(tmp_path / "edges.jpg")


def test_the_kernel_finds_the_same_edges(device: str) -> None:
    """Along the temple's roof; and, where the picture is even, none."""
    edges = demo("edges")
    brightness = torch.from_numpy(edges.photograph()[100:150, 130:220].mean(axis=2)).to(device)
    with gpunn.trace() as trace:
        found = edges.find_edges(brightness)
    launched(trace, "conv_forward")
    assert edges.largest_difference(found, brightness) <= edges.EXPECTED
    assert found.amax(dim=(1, 2)).min() > 1, "the roof has edges in every direction"
    even = edges.find_edges(torch.full_like(brightness, 0.5))
    assert even.abs().max() < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_demo_uses_the_kernels(digits_mlp: ModuleType, tmp_path: Path) -> None:
    options = digits_mlp.parse(["--quick", "--out", str(tmp_path)])
    assert options.device.type == "cuda"
    with gpunn.backend("auto"):
        result = digits_mlp.run(options)
    assert {record.operator for record in result.trace.launches} >= {
        "linear_forward",
        "linear_epilogue_backward",
    }
    assert result.accuracy >= options.expected


@pytest.mark.parametrize(
    ("module", "imported_before"),
    [
        ("rich.progress", ()),
        ("matplotlib.figure", ("rich",)),
        ("sklearn.datasets", ("rich", "matplotlib")),
    ],
)
def test_a_missing_package_is_named(
    module: str, imported_before: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in imported_before:
        pytest.importorskip(package, reason=f"no {package}: pip install 'gpunn[demo]'")
    for ours in ("digits_mlp", "loops"):
        monkeypatch.delitem(sys.modules, ours, raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # importing it now fails
    with pytest.raises(ModuleNotFoundError, match=rf"need {module}.*pip install 'gpunn\[demo\]'"):
        importlib.import_module("digits_mlp")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--device", "abacus"], "--device: expected auto, cpu or cuda, got abacus"),
        (["--device", "meta"], "--device: expected auto, cpu or cuda, got meta"),
        (["--device", "cuda"], "PyTorch finds no CUDA device"),
        (["--steps", "1", "--out", "/dev/null/x"], "--out: cannot write into /dev/null/x: "),
    ],
)
def test_bad_options_are_refused(
    digits_mlp: ModuleType,
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        digits_mlp.main(arguments)
    assert complaint in capsys.readouterr().err
