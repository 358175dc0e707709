"""What is shipped: a wheel with every file that it should hold, and nothing that hides others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What lies about in a checkout and is no source: a wheel would take over a stale build/.
NO_SOURCES = (".*", "__pycache__", "build", "dist", "out", "*.egg-info")

USE = """
import pathlib, sys
import gpunn, gpunn.kernels.cuda, gpunn.nn, gpunn.profiling.gpu_run, torch

target = pathlib.Path(sys.argv[1])
for module in (gpunn, gpunn.nn, gpunn.kernels.launch, gpunn.profiling.gpu_run):
    assert target in pathlib.Path(module.__file__).parents, module
y = gpunn.nn.Linear(3, 5)(torch.ones(2, 3))
assert y.shape == (2, 5) and y.isfinite().all()
assert "T" in gpunn.kernels.cuda.CudaKernel("dropout.cu", "dropout_kernel").parameters
"""


def run(*command: str, folder: Path, pythonpath: Path | None = None) -> str:
    """Run a command as a user elsewhere would; its output, or a failure that shows it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if pythonpath:
        environment["PYTHONPATH"] = str(pythonpath)
    result = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = result.stdout.decode()
    assert result.returncode == 0, f"{' '.join(command)}:\n{output}"
    return output


def build_wheel(folder: Path) -> Path:
    """Build the source distribution, and the wheel from it, of a clean copy of the checkout."""
    shutil.copytree(
        ROOT, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(*NO_SOURCES)
    )
    built = folder / "built"
    source = str(folder / "source")
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), source),
        folder=folder,
    )
    (wheel,) = built.glob("*.whl")
    return wheel


def shipped() -> set[str]:
    """The files that a wheel should hold, as their paths in it, read from the folders' contents."""
    places = {"gpunn": "gpunn"} | {
        name: f"gpunn/{name}" for name in ("kernels", "profiling", "examples")
    }
    return {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in places.items()
        for pattern in ("*.py", "*.cu", "*.h", "data/*", "py.typed")
        for path in (ROOT / folder).rglob(pattern)
    }


@pytest.mark.timeout(600)
def test_the_wheel_holds_what_it_should_and_works_elsewhere(tmp_path: Path) -> None:
    """One test, since building takes long: build, compare the contents, install, use."""
    pytest.importorskip("build", reason="building needs the package build")
    wheel = build_wheel(tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == shipped()
    last_parts = {name.split("/", 1)[1] for name in metadata}
    assert {"licenses/LICENSE", "entry_points.txt", "METADATA"} <= last_parts

    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet")
    run(*pip, "--target", str(target), str(wheel), folder=elsewhere)
    run(sys.executable, "-c", USE, str(target), folder=elsewhere, pythonpath=target)
    said = run(sys.executable, "-m", "gpunn", "doctor", folder=elsewhere, pythonpath=target)
    assert "triton" in said.lower()
    demos = run(sys.executable, "-m", "gpunn", "demo", folder=elsewhere, pythonpath=target)
    assert "LeNet-5" in demos


@pytest.mark.parametrize("name", ["kernels", "profiling"])
def test_the_root_hides_no_package(name: str, tmp_path: Path) -> None:
    """With the root first on the path, another package of that name is what is imported."""
    other = tmp_path / name / "__init__.py"
    other.parent.mkdir()
    other.write_text("")
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(tmp_path)]}; import {name}"
    found = run(sys.executable, "-c", f"{code}; print({name}.__file__)", folder=tmp_path)
    assert Path(found.strip()) == other
