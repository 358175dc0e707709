"""The house's rules, held by reading the source: layout, imports, one stem an op, budgets."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from kit import CONTAINERS, OPS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("gpunn", "kernels", "profiling", "tests", "examples")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
TOP_LEVEL = {"examples", "gpunn", "kernels", "profiling", "tests"}

# What a room may import of gpunn and of third parties, besides itself.
ROOMS = {
    "kernels": {"gpunn.kernels", "torch", "triton", "numpy", "cupy"},
    "gpunn/functional": {"gpunn.functional", "gpunn.kernels", "torch"},
    "gpunn/nn": {"gpunn.nn", "gpunn.functional", "torch"},
    "gpunn/models": {"gpunn", "gpunn.models", "gpunn.nn", "torch"},
    "gpunn/reference": {"gpunn.reference", "numpy"},
}
STANDARD = {
    "__future__", "ast", "bisect", "collections", "contextlib", "dataclasses", "functools",
    "itertools", "math", "struct", "threading", "typing", "warnings",
}  # fmt: skip
# Only these files of kernels/ may read files, run programs and load libraries: they compile.
COMPILING = {
    "kernels/nvrtc.py": {"cupy_backends", "pathlib"},
    "kernels/cuda.py": {"pathlib", "re", "warnings"},
    "kernels/host.py": {
        "ctypes", "hashlib", "os", "pathlib", "re", "shutil", "subprocess", "tempfile",
    },
}  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports_of(tree: ast.Module) -> set[str]:
    """Dotted names that a module imports, also inside its functions."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def functions_of(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def parameters_of(function: ast.FunctionDef) -> tuple[list[str], list[str]]:
    """The names of all parameters, and of those that are constexprs."""
    arguments = [(a.arg, ast.unparse(a.annotation or ast.Constant(""))) for a in function.args.args]
    return [n for n, _ in arguments], [n for n, kind in arguments if "constexpr" in kind]


def test_only_the_agreed_folders_hold_code() -> None:
    ignored = {"out", "build", "dist"}
    with_code = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and path.name[0] not in "._" and any(path.rglob("*.py"))
    }
    assert {name for name in with_code if not name.endswith(".egg-info")} - ignored == TOP_LEVEL


@pytest.mark.parametrize("folder", ["kernels", "profiling"])
def test_folders_that_would_hide_another_package_have_no_init(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / "gpunn" / folder).is_symlink()
    assert (ROOT / "gpunn" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    checked = 0
    for path in sorted((ROOT / room).glob("*.py")):
        for name in imports_of(parsed(path)):
            top = name.split(".")[0]
            allowed = ROOMS[room] | STANDARD | COMPILING.get(name_of(path), set())
            fits = any(name == a or name.startswith(f"{a}.") for a in allowed)
            # ``import gpunn.functional as GF`` is the one way a module names the room below it
            assert fits or (top == "gpunn" and name == "gpunn"), f"{name_of(path)} imports {name}"
            checked += 1
    assert checked


def test_the_host_execution_needs_the_standard_library_alone() -> None:
    """So that it runs where torch and triton cannot, as under the address sanitizer."""
    imports = imports_of(parsed(ROOT / "kernels" / "host.py"))
    assert {name.split(".")[0] for name in imports} <= sys.stdlib_module_names


def test_only_tests_and_check_import_the_references() -> None:
    for path in SOURCES:
        if "tests" in path.parts or path.parent.name == "reference":
            continue
        uses = any(name.startswith("gpunn.reference") for name in imports_of(parsed(path)))
        may = name_of(path) == "gpunn/check.py" or path.parent.name == "checks"
        assert not uses or may, name_of(path)


def test_there_is_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in (p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("gpunn", "kernels")):
        relative = path.relative_to(ROOT).with_suffix("")
        parts = ("gpunn", *relative.parts) if relative.parts[0] == "kernels" else relative.parts
        name = ".".join(parts).removesuffix(".__init__")
        body = ast.Module([n for n in parsed(path).body if not isinstance(n, ast.FunctionDef)], [])
        graph[name] = {found for found in imports_of(body) if found.startswith("gpunn.")}
    # A package's __init__ is executed first by design; what counts is the modules in it.
    graph = {
        name: {target for target in targets if target in graph and target != name}
        for name, targets in graph.items()
    }

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        for target in graph[name]:
            visit(target, (*trail, name))

    assert len(graph) > 10
    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_file_in_every_room(op: str) -> None:
    rooms = ("kernels", "gpunn/functional", "gpunn/nn", "gpunn/reference")
    missing = [room for room in rooms if not (ROOT / room / f"{op}.py").exists()]
    if not (ROOT / "tests" / f"test_{op}.py").exists():
        missing.append("tests")
    assert not missing, f"{op} lacks a file in {missing}; if it is no op, say so in kit.NO_OPS"


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_case_and_a_check(op: str) -> None:
    from gpunn.check import CHECKS
    from gpunn.profiling.cases import CASES

    assert CASES.get(op), f"{op} has no Case in CASES of profiling/cases.py"
    assert CHECKS.get(op), f"{op} has no Check in gpunn/checks"


def test_files_and_functions_keep_their_budget() -> None:
    over = [
        f"{name_of(path)}: {n} lines, over 400: a part of it makes a file of its own"
        for path in SOURCES
        if (n := path.read_text().count("\n")) > 400
    ]
    for path in SOURCES:
        for function in functions_of(parsed(path)):
            documented = isinstance(function.body[0], ast.Expr)
            body = function.body[1:] if documented and len(function.body) > 1 else function.body
            lines = (function.end_lineno or 0) - body[0].lineno + 1
            limit = 80 if is_kernel(function) else 40
            if lines > limit:
                over.append(f"{name_of(path)}: {function.name} has {lines} lines, over {limit}")
    assert not over, "\n".join(over)


def test_every_masked_load_says_what_the_rest_is() -> None:
    """The interpreter fills masked-off elements with zeros, a GPU with whatever was there."""
    loads = 0
    for path in KERNELS:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                keywords = {keyword.arg for keyword in node.keywords}
                loads += 1
                assert "mask" not in keywords or "other" in keywords, (
                    f"{name_of(path)}:{node.lineno}: a masked load without other="
                )
    assert loads > 5


def test_parameters_of_device_functions_come_in_order() -> None:
    """A kernel's: pointers, then sizes, strides and scalars, then constexprs, in capitals.

    An ``a`` beside a constexpr ``A_LAYOUT`` is a pointer or a tensor descriptor, as that says.
    """
    for path in KERNELS:
        for function in filter(is_kernel, functions_of(parsed(path))):
            arguments, constexprs = parameters_of(function)
            where = f"{name_of(path)}: {function.name}"
            assert arguments[len(arguments) - len(constexprs) :] == constexprs, where
            if function.name.endswith("_kernel"):
                assert all(name.isupper() for name in constexprs), where
                in_memory = [
                    name
                    for name in arguments
                    if name.endswith("_ptr") or f"{name.upper()}_LAYOUT" in constexprs
                ]
                assert in_memory, f"{where}: no parameter is called …_ptr"
                assert arguments[: len(in_memory)] == in_memory, f"{where}: pointers come first"


def test_kernels_are_named_and_documented() -> None:
    """A kernel (launched by the host) ends in _kernel and says what it computes."""
    kernels = 0
    for path in KERNELS:
        for function in filter(is_kernel, functions_of(parsed(path))):
            if function.name.endswith("_kernel"):
                kernels += 1
                docstring = ast.get_docstring(function) or ""
                assert docstring, f"{function.name} has no docstring"
                assert docstring.count("\n") < 8, f"{function.name}: at most eight lines"
    assert kernels > 5


def test_a_flat_index_is_wide() -> None:
    """Where a program owns BLOCK elements of a tensor, the index of the first can pass 2^31.

    So can the step from one block to the next, of as many programs as there are blocks.
    """
    for path in KERNELS:
        narrow = re.search(r"(program_id|num_programs)\(\d\) \* BLOCK\b", path.read_text())
        assert not narrow, f"{name_of(path)}: write tl.{narrow[1]}(0).to(tl.int64) * BLOCK"


def test_public_names_are_documented_and_defined_here() -> None:
    import torch

    import gpunn
    import gpunn.functional
    import gpunn.models
    import gpunn.nn

    for package in (gpunn, gpunn.functional, gpunn.models, gpunn.nn):
        for name in package.__all__:
            value = getattr(package, name)
            if name in CONTAINERS:
                assert value is getattr(torch.nn, name)
            elif callable(value):
                assert value.__module__.startswith("gpunn"), name
                assert value.__doc__, f"{name} has no docstring"


def test_every_layer_is_exported() -> None:
    """``accelerate`` does not find one that is not."""
    import gpunn.nn

    classes = {
        node.name
        for path in (ROOT / "gpunn" / "nn").glob("*.py")
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }
    missing = classes - set(gpunn.nn.__all__)
    assert not missing, f"the import and __all__ of gpunn/nn/__init__.py lack {sorted(missing)}"


def test_the_readme_names_every_function_and_layer() -> None:
    """A layer that is a function's namesake by the function's name."""
    import gpunn.functional
    import gpunn.nn

    named = set(re.findall(r"`(\w+)`", (ROOT / "README.md").read_text()))
    functions = set(gpunn.functional.__all__)
    namesakes = {name.replace("_", "").lower() for name in named & functions}
    layers = {name for name in gpunn.nn.__all__ if name.lower() not in namesakes} - CONTAINERS
    missing = (functions | layers) - named
    assert not missing, f'"What there is" in README.md lacks {sorted(missing)}'


def test_importing_gpunn_imports_neither_a_gpu_library_nor_the_compiler() -> None:
    import subprocess
    import sys

    code = (
        "import sys, gpunn, torch; assert not torch.cuda.is_initialized();"
        "print({'cupy', 'torch._dynamo'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "set()"


def test_constants_are_marked_as_torch_marks_them() -> None:
    import torch

    from gpunn.kernels.launch import assume_constant_result

    def one() -> None: ...

    def other() -> None: ...

    theirs = torch.compiler.assume_constant_result(one)
    assert vars(theirs) == vars(assume_constant_result(other)) != {}


def test_no_star_imports_no_leftovers() -> None:
    for path in SOURCES:
        tree = parsed(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), name_of(path)
        if path != Path(__file__).resolve():
            text = path.read_text()
            assert "make_block_ptr" not in text, name_of(path)
            assert "triton.autotune" not in text, name_of(path)
