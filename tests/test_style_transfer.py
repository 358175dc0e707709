"""The style demo: its figures, its options and files, how it is resumed, its refusals."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gpunn
from gpunn import models

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _as_on_a_cpu(demo_folder: Path) -> Iterator[None]:
    """PyTorch computes."""
    with gpunn.backend("torch"):
        yield


@pytest.fixture
def demo() -> ModuleType:
    return importlib.import_module("style_transfer")


@pytest.fixture
def networks() -> ModuleType:
    return importlib.import_module("feature_networks")


@pytest.fixture
def untrained(demo: ModuleType, networks: ModuleType, monkeypatch: Patch) -> None:
    """The demo takes a small random network for the trained one, and few steps, by PyTorch."""

    def small(*_: object) -> Any:
        network = networks.random_network(5)
        network.dream = (2, 4)
        return network

    monkeypatch.setattr(networks, "RANDOM_WIDTHS", (8, 8, 8, 8))
    monkeypatch.setattr(demo, "trained_network", small)
    few = demo.Setting(48, 1, 3, (1.0, 50.0), 50.0, 2, n_photographs=1)
    monkeypatch.setattr(demo, "QUICK", few)


def assert_shows_something(picture: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(picture) / 255
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 0.1, "the picture is blank"


def picture_of(path: Path, height: int, width: int, mode: str = "RGB") -> Path:
    """A file with an image of noise."""
    from PIL import Image

    Image.effect_noise((width, height), 60).convert(mode).save(path)
    return path


def test_the_quick_demo_reaches_its_figure(
    demo: ModuleType, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "new" / "folder"
    assert demo.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "× conv2d" in printed
    assert "china, style × 40: Gram distance" in printed
    last = printed.splitlines()[-1]
    said = re.fullmatch(
        r"Gram distance from the painting: ([\d.]+)% of the photograph's "
        r"\(expected: at most 1%\); correlation of edges with the photograph: ([\d.]+) "
        r"\(expected: at least 0\.39\)",
        last,
    )
    assert said, last
    assert float(said[1]) <= 100 * demo.DISTANCE_EXPECTED == 1
    assert float(said[2]) >= demo.EDGES_EXPECTED == 0.39
    assert_shows_something(out / "style_china.jpg")


@pytest.mark.usefixtures("untrained")
def test_files_of_ones_own_are_painted(demo: ModuleType, tmp_path: Path, capsys: Capture) -> None:
    """Grey or with an alpha channel; no expectation is said of them, and all ratios are shown."""
    content = picture_of(tmp_path / "mine.png", 40, 60, "RGBA")
    style = picture_of(tmp_path / "painting.png", 70, 50, "L")
    files = ["--content", str(content), "--style", str(style)]
    assert demo.main(["--quick", "--device", "cpu", "--out", str(tmp_path), *files]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"mine, style × (\d+)", printed) == ["1", "50"]
    assert "expected" not in printed
    assert_shows_something(tmp_path / "style_mine.jpg")


@pytest.mark.usefixtures("untrained")
def test_a_painting_needs_no_painting(
    demo: ModuleType, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """Where content and style are one image, the distance is from nothing, and none is expected."""
    monkeypatch.setattr(demo, "save", lambda _, path: path)
    files = ["--content", str(demo.PAINTING)]
    assert demo.main(["--quick", "--device", "cpu", "--out", str(tmp_path), *files]) == 0
    printed = capsys.readouterr().out
    assert "style × 50: Gram distance" in printed
    assert "expected" not in printed


@pytest.mark.usefixtures("untrained")
def test_a_dream_amplifies_what_a_layer_sees(
    demo: ModuleType, tmp_path: Path, capsys: Capture
) -> None:
    assert demo.main(["--quick", "--dream", "--device", "cpu", "--out", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    said = re.fullmatch(
        r"What a layer sees is ([\d.]+) times as strong, or more \(expected: at least 1\.2\)", last
    )
    assert said, last
    assert float(said[1]) > 1.02, "after eight steps on an untrained network"
    assert_shows_something(tmp_path / "dream_china.jpg")


@pytest.fixture
def small(demo: ModuleType, networks: ModuleType, monkeypatch: Patch) -> list[list[torch.Tensor]]:
    """The demo has small networks, pictures and rounds; the images of each sheet that it draws."""
    monkeypatch.setattr(networks, "WIDTHS", (2, 2, 2, 2))
    monkeypatch.setattr(networks, "RANDOM_WIDTHS", (4, 4, 4, 4))
    monkeypatch.setattr(networks, "RANDOM_KERNELS", (3, 3, 3, 3))
    monkeypatch.setattr(networks, "BATCH", 2)
    monkeypatch.setattr(networks, "SAVE_EVERY", 2)
    monkeypatch.setattr(importlib.import_module("image_optimisation"), "ROUND", 4)
    monkeypatch.setattr(demo, "QUICK", demo.Setting(32, 5, 10, (1.0, 50.0), 50.0, 2, 1))
    sheets = list[list[torch.Tensor]]()
    monkeypatch.setattr(demo, "draw_sheet", lambda cells, **_: sheets.append([i for _, i in cells]))
    monkeypatch.setattr(demo, "save", lambda _, path: path)
    return sheets


@pytest.mark.usefixtures("small")
def test_what_is_painted_and_who_judges(
    demo: ModuleType, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """The photograph in the painting's colours; another random network, in units of what was."""
    seeds, distances, real = list[int](), [0.5, 0.1, 0.05], demo.random_network

    def spy(seed: int) -> Any:
        seeds.append(seed)
        return real(seed)

    def stay(_: Any, photograph: torch.Tensor, painting: torch.Tensor, *__: Any) -> torch.Tensor:
        colours = [image.mean((1, 2)) for image in (photograph, painting)]
        torch.testing.assert_close(*colours, atol=0.03, rtol=0)
        return photograph

    monkeypatch.setattr(demo, "random_network", spy)
    monkeypatch.setattr(demo, "judge", lambda *_: distances.pop(0))
    monkeypatch.setattr(demo, "transfer", stay)
    assert demo.main(["--quick", "--device", "cpu", "--seed", "3", "--out", str(tmp_path)]) == 0
    assert seeds[0] == 3
    assert len(set(seeds)) == 2
    said = re.findall(r"style × (\d+): Gram distance ([\d.]+)%", capsys.readouterr().out)
    assert said == [("1", "20.00"), ("50", "10.00")]


def steps_until(n: int, monkeypatch: Patch) -> list[int]:
    """The run is killed before its n-th step; the steps that it took."""
    taken = list[int]()

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any) -> Any:
            if len(taken) == n:
                raise KeyboardInterrupt
            taken.append(len(taken))
            return real(*given)

        return step

    optimisation = importlib.import_module("image_optimisation")
    for owner, name in (
        (importlib.import_module("feature_networks"), "train_step"),
        (optimisation.Goal, "losses"),
        (optimisation, "strength"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return taken


@pytest.mark.parametrize("dream", [[], ["--dream"]])
def test_killed_and_resumed_is_uninterrupted(
    demo: ModuleType,
    small: list[list[torch.Tensor]],
    dream: list[str],
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    """Again and again, in any step of the training, a picture or a dream: the same, bit for bit."""
    given = ["--quick", "--device", "cpu", *dream, "--out"]
    with monkeypatch.context() as patch:
        taken = steps_until(-1, patch)
        demo.main([*given, str(tmp_path / "whole")])
    (expected,) = small
    lives = 0
    for lives in range(1, 30):
        torch.manual_seed(lives)
        with monkeypatch.context() as patch:
            n = int(torch.randint(3, len(taken) // 2, ()))
            lived = steps_until(n, patch)
            try:
                demo.main([*given, str(tmp_path / "killed"), "--resume"])
                break
            except KeyboardInterrupt:
                assert len(lived) == n
    assert lives > 2, "it was hardly ever killed"
    assert len(small) == 2
    for got, exact in zip(small[1], expected, strict=True):
        assert torch.equal(got, exact)


def test_what_was_computed_is_not_again(
    demo: ModuleType, small: list[list[torch.Tensor]], tmp_path: Path, monkeypatch: Patch
) -> None:
    """Every picture and dream is there, and its own; a dream takes the network that painted."""
    given = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    demo.main(given)
    taken = steps_until(-1, monkeypatch)
    demo.main([*given, "--resume"])
    assert len(taken) == 1, "the traced step alone"
    assert all(map(torch.equal, *small))
    assert not torch.equal(*small[0][1:3])
    monkeypatch.delattr(importlib.import_module("feature_networks"), "train_step")
    assert demo.main([*given, "--resume", "--dream"]) == 0
    assert not torch.equal(*small[2][1:3])


@pytest.mark.usefixtures("small")
def test_what_cannot_be_resumed_is_refused(
    demo: ModuleType, tmp_path: Path, capsys: Capture
) -> None:
    given = ["--quick", "--device", "cpu", "--resume", "--out", str(tmp_path)]
    assert demo.main(given) == 0
    assert f"No checkpoint in {tmp_path / 'checkpoints'}: from the beg" in capsys.readouterr().err
    painting = picture_of(tmp_path / "other.png", 50, 60)
    for changed, complaint in (
        (["--seed", "1"], "the checkpoint has seed = 0, this run 1"),
        (["--steps", "3"], "the checkpoint has steps = 10, this run 3"),
        (["--style", str(painting)], "the checkpoint has style = [0-9a-f]+, this run [0-9a-f]+"),
        (["--content", str(painting)], "the checkpoint has content = "),
    ):
        assert demo.main([*given, *changed]) == 1
        assert re.search(f"--resume: {complaint}", capsys.readouterr().err)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"nothing")
    assert demo.main(given) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("options", "steps"), [([], (7, 2)), (["--dream"], (10, 7))])
def test_steps_are_of_what_is_made(
    demo: ModuleType, options: list[str], steps: tuple[int, int], tmp_path: Path
) -> None:
    setting = demo.parse(["--quick", "--steps", "7", "--out", str(tmp_path), *options]).setting
    assert (setting.steps, setting.dream_steps) == steps


@pytest.mark.parametrize(("name", "n"), [("china.png", 4), (None, 3)])
def test_ones_own_photograph_is_learnt_from(
    demo: ModuleType, name: str | None, n: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Though one of scikit-learn's has its name; and the painting once, if it is content, too."""
    learnt = list[torch.Tensor]()
    monkeypatch.setattr(demo, "trained_network", lambda images, *_: learnt.extend(images))
    monkeypatch.setattr(demo, "calibrated", lambda *_: None)
    content = demo.PAINTING if name is None else picture_of(tmp_path / name, 250, 300)
    options = demo.parse(["--out", str(tmp_path), "--content", str(content)])
    demo.networks_for(options, demo.open_journal(tmp_path, False, {}))
    own = demo.resized(demo.read_image(content), demo.TRAINING_SIDE)
    assert len(learnt) == n
    assert any(image.shape == own.shape and (image - own).std() < 0.05 for image in learnt)


@pytest.fixture(scope="module")
def vgg_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision's of VGG-19, with random convolutions and stand-ins of dense layers."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in models.vgg19().features.state_dict().items()}
    weights = {f"features.{name}": torch.randn(shape) / 50 for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("weights") / "vgg19.pth"
    torch.save(weights | {"classifier.0.weight": torch.ones(1)}, path)
    return path


def test_vgg19_is_read_by_torchvisions_names(networks: ModuleType, vgg_weights: Path) -> None:
    """conv1_1 sees ImageNet's normalisation; the content is conv4_2's, which follows conv4_1."""
    weights = torch.load(vgg_weights, weights_only=True)
    network = networks.vgg19_network(vgg_weights)
    image = torch.rand(1, 3, 32, 32)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    *style, content = network(image, (*network.style, network.content))
    pooled, before = network(image, [4, 3])
    expected = F.conv2d(
        (image - mean) / deviation, weights["features.0.weight"], weights["features.0.bias"],
        padding=1,
    ).relu()  # fmt: skip
    torch.testing.assert_close(style[0], expected)
    expected = F.conv2d(
        style[3], weights["features.21.weight"], weights["features.21.bias"], padding=1
    ).relu()
    torch.testing.assert_close(content, expected)
    sizes = [tuple(maps.shape[1:3]) for maps in (*style, content)]
    assert sizes == [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2), (512, 4)]
    torch.testing.assert_close(pooled, F.avg_pool2d(before, 2))
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.usefixtures("untrained")
def test_with_vgg19_nothing_is_trained(
    demo: ModuleType, vgg_weights: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.delattr(demo, "trained_network")
    few = demo.Setting(32, 1, 2, (1.0,), 1.0, 1, n_photographs=1)
    monkeypatch.setattr(demo, "QUICK", few)
    options = ["--quick", "--weights", str(vgg_weights), "--device", "cpu", "--out", str(tmp_path)]
    assert demo.main(options) == 0
    printed = capsys.readouterr().out
    assert "expected" not in printed
    assert re.search(r"style × 1: Gram distance [\d.]+%", printed)


def as_text(path: Path) -> Path:
    path.write_text("no image")
    return path


def with_a_wrong_shape(path: Path) -> Path:
    torch.save({"features.0.weight": torch.ones(64, 3, 5, 5)}, path)
    return path


def as_list(path: Path) -> Path:
    torch.save([1, 2], path)
    return path


@pytest.mark.parametrize(
    ("option", "make", "complaint"),
    [
        ("--content", as_text, "cannot be read as an image"),
        ("--content", lambda path: path, "cannot be read as an image: .*No such file"),
        ("--style", lambda path: path.parent, "cannot be read as an image"),
        ("--style", lambda path: picture_of(path.with_suffix(".png"), 10, 41),
         "expected an image at most 4 times as long as wide, got 41×10 pixels"),
        ("--weights", as_text, "cannot be read as a state_dict"),
        ("--weights", lambda path: path, "cannot be read as a state_dict: .*No such file"),
        ("--weights", as_list, r"expected features\.0\.weight of .*\(64, 3, 3, 3\), found nothing"),
        ("--weights", with_a_wrong_shape, r"\(64, 3, 3, 3\), found \(64, 3, 5, 5\)"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(
    demo: ModuleType,
    option: str,
    make: Callable[[Path], Path],
    complaint: str,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    path = make(tmp_path / "file")
    with pytest.raises(SystemExit):
        demo.main(["--quick", option, str(path)])
    said = capsys.readouterr().err
    assert f"{option}: {path}" in said
    assert re.search(complaint, said), said


def test_bad_steps_are_refused(demo: ModuleType, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0"])
    assert "--steps: expected 1 or more, got 0" in capsys.readouterr().err
