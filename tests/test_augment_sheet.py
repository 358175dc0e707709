"""The contact sheet: it shows every distortion, the kernel draws it, and a seed determines it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import gpunn
from kit import launched


@pytest.fixture
def sheet(demo_folder: Path) -> ModuleType:
    """The demo, which imports what it shares as scripts do, from its own folder."""
    pytest.importorskip("PIL", reason="no pillow, which scikit-learn reads photographs with")
    return importlib.import_module("augment_sheet")


def test_the_quick_demo_draws_its_sheet(
    sheet: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    with gpunn.backend("torch"):
        assert sheet.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "Draws that are the same in another batch: 9 of 9 (expected: 9)"
    pixels = imread(tmp_path / "sheet.jpg")
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 30, "the picture is blank"


def test_every_row_shows_its_distortion(sheet: ModuleType, device: str) -> None:
    """By the kernel, on bytes as they are read: first the photograph, then others, stronger."""
    with gpunn.trace() as trace:
        rows = sheet.draw_rows(torch.device(device), 3, 0)
    launched(trace, "augment_forward")
    titles = [row.title for row in rows]
    assert len(set(titles)) == len(rows) == len(sheet.GROWING) + len(sheet.DRAWN) + 1
    for row, (_, name, _) in zip(rows, sheet.GROWING, strict=False):
        photo = sheet.photograph(name).permute(2, 0, 1).to(device) / 255
        apart = [float((picture - photo).abs().mean()) for picture in row.pictures]
        assert apart[0] < 1e-6, row.title
        assert 0.02 < apart[1] < apart[2], row.title
    for row in rows[len(sheet.GROWING) :]:
        apart = (row.pictures[0] - row.pictures[1:]).abs().amax(dim=(1, 2, 3))
        assert apart.max() > 0.2, row.title
        assert -1e-6 < row.pictures.min() < row.pictures.max() < 1 + 1e-6
    assert rows[-1].pictures.shape == (10, 1, 85, 85)


def test_pictures_that_differ_are_not_counted(sheet: ModuleType, device: str) -> None:
    rows = sheet.draw_rows(torch.device(device), 2, 0)
    assert sheet.drawn_again(rows, torch.device(device), 2, 0) == 6
    rows[-2].pictures[1, 0, 0, 0] += 0.1
    assert sheet.drawn_again(rows, torch.device(device), 2, 0) == 5
    assert sheet.drawn_again(rows, torch.device(device), 2, 1) < 4


def test_bad_options_are_refused(sheet: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sheet.main(["--device", "abacus"])
    assert "--device: expected auto, cpu or cuda, got abacus" in capsys.readouterr().err
