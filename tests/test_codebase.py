"""The rules of the house that a test can check: imports, names, sizes, documents, the README's code.

Ruff holds the rules of complexity for Python (pyproject.toml), helpers/imports.py computes the graph of imports."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bnfast
import imports
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SETUP_COMMANDS = ['pip install ".[demo]" && bnfast demo', 'pip install ".[test]" && pytest']
MOST_FLOORS = 9
MOST_LINES = 60  # of a C++ function; ruff counts statements and branches of Python's
CPP = {".h", ".hpp", ".cpp", ".cc", ".c"}
TEXT = CPP | {".py", ".pyi", ".md", ".toml", ".txt", ".json", ".cmake", ".in", ".yml", ".yaml", ".sh", ""}
# C headers alone: what a C++ header brings in (templates, inline functions) the linker may hand to another file.
PURE_HEADERS = {
    *("assert.h", "fenv.h", "float.h", "inttypes.h", "limits.h", "math.h", "stdalign.h", "stdbool.h", "stddef.h"),
    *("stdint.h", "string.h", "immintrin.h", "arm_neon.h"),
}


def repository_files() -> list[Path]:
    """What git tracks or would: everything not ignored. Without git, the folders and files this project has."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        folders = (".ci", "bench", "csrc", "docs", "examples", "python", "tests")
        files = [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    return [path for path in files if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts]


FILES = repository_files()


def under(*folders: str) -> Iterator[Path]:
    """The repository's files below any of `folders`."""
    return (path for path in FILES if any(path.is_relative_to(ROOT / folder) for folder in folders))


def naming(pattern: str, paths: Iterator[Path]) -> set[str]:
    """Which of `paths`, relative to the root, hold a match of `pattern`."""
    return {str(path.relative_to(ROOT)) for path in paths if re.search(pattern, path.read_text())}


def test_there_is_something_to_check():
    assert {
        ROOT / "README.md",
        ROOT / "csrc" / "cpu" / "parallel.h",
        ROOT / "python" / "bnfast" / "__init__.py",
    } <= set(FILES)


def functions(text: str) -> Iterator[tuple[str, int]]:
    """The first line of each C++ function and how many lines it has. clang-format puts both ends at one indentation."""
    lines = text.splitlines()
    for first, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if indent in (0, 4) and re.search(r"\) *(const|noexcept|override| )*(: .*)?\{$", line):
            end = next(i for i in range(first, len(lines)) if re.match(rf"\s{{{indent}}}\}}", lines[i]))
            if indent == 0 or re.match(r"\s*(?!(if|for|while|switch|else|do)\b)\w", line):
                yield line.strip(), end - first + 1


def test_functions_of_cpp_stay_short():
    found = [
        (str(path.relative_to(ROOT)), *one)
        for path in under("csrc")
        if path.suffix in CPP
        for one in functions(path.read_text())
    ]
    assert len(found) > 300, "the functions are found"
    assert [one for one in found if one[2] > MOST_LINES] == []


def test_only_parallel_names_openmp():
    found = naming(r"\bomp_\w+|#\s*pragma\s+omp|<omp\.h>|\b_OPENMP\b", under("csrc"))
    assert {name for name in found if not re.fullmatch(r"csrc/cpu/parallel\.\w+|csrc/tests/.*", name)} == set()


def test_only_the_binding_names_pybind11():
    found = naming("pybind11|<Python.h>", (path for path in under("csrc") if path.suffix in CPP))
    assert {name for name in found if not name.startswith("csrc/bind/")} == set()


# ---- imports ---------------------------------------------------------------------------------------------------------


def importers(*packages: str) -> set[str]:
    """The rooms with a file that imports one of `packages`."""
    return {imports.room_of(name) for name, path in imports.modules().items() if imports.outside(path) & {*packages}}


def test_imports_go_one_way():
    assert imports.circles(imports.module_graph()) == []
    assert imports.circles(imports.room_graph()) == []
    assert max(imports.floors(imports.room_graph()).values()) <= MOST_FLOORS


FRONTS = {"bnfast.cli", "bnfast.benchmark", "bnfast.compat"}
KERAS = {"bnfast.keras", "bnfast.keras.layers", "bnfast.keras.models"}


def test_frameworks_stay_in_their_rooms():
    assert importers("tensorflow") <= FRONTS | KERAS | {"bnfast.tensorflow", "bnfast.tensorflow.training"}
    assert importers("keras", "tf_keras") <= FRONTS | KERAS
    # layers: to_torch; cuda: autograd; keras.models: copies of tensors
    rooms = {"bnfast.torch", "bnfast.benchmark", "bnfast.layers", "bnfast.cuda", "bnfast.keras.models"}
    assert importers("torch") <= rooms
    rooms = {"bnfast.jax", "bnfast.benchmark", "bnfast.keras.layers", "bnfast.keras.models"}
    assert importers("jax", "flax") <= rooms


def test_only_the_fronts_import_bnfast_keras():
    for room, targets in imports.room_graph().items():
        assert room in FRONTS | KERAS or not targets & KERAS, room


def test_the_keras_layers_reach_tensorflow_through_one_module():
    door = "bnfast.keras.layers.framework"
    for name, targets in imports.module_graph().items():
        if imports.room_of(name) == "bnfast.keras.layers":
            assert "tensorflow" not in imports.outside(imports.modules()[name]) or name == door, name
            assert name == door or not any(target.startswith("bnfast.tensorflow") for target in targets), name


def test_importing_bnfast_needs_numpy_alone():
    code = (
        "import sys, numpy; before = set(sys.modules); import bnfast; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - {'numpy'} - set(sys.stdlib_module_names))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "bnfast\n"


# ---- C++ -------------------------------------------------------------------------------------------------------------


def test_kernels_include_nothing_that_could_leak_their_instructions():
    seen: set[Path] = set()
    waiting = [path for path in under("csrc/cpu/kernels") if path.suffix in CPP]
    assert waiting
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
            if bracket == "<":
                assert name in PURE_HEADERS, f"{path.relative_to(ROOT)} includes <{name}>"
                continue
            places = [path.parent / name, ROOT / "csrc" / name, ROOT / "csrc" / "include" / name]
            found = next((place.resolve() for place in places if place.exists()), None)
            assert found is not None, f"{path.relative_to(ROOT)} includes {name}, which is not in csrc/"
            if found not in seen:
                waiting.append(found)


# ---- documents and names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in bnfast.__all__ if name != "__version__"])
def test_public_names_are_documented(name):
    member = getattr(bnfast, name)
    assert member.__doc__
    assert not member.__doc__.startswith(f"{name}("), "only what NamedTuple writes by itself"
    assert f"`{name}`" in README or f"`{name}`" in "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))


def test_the_stub_lists_what_the_core_has():
    from bnfast import _core

    statements = ast.parse((ROOT / "python" / "bnfast" / "_core.pyi").read_text()).body
    own = [node for node in statements if not getattr(node, "bases", [])]  # a TypedDict is the stub's alone
    listed = {node.name for node in own if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    real = {name for name in dir(_core) if not name.startswith("__") and callable(getattr(_core, name))}
    assert listed == real


def code_blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of those languages."""
    return [body for language, body in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if language in languages]


def test_the_readme_gives_exactly_two_setup_commands():
    assert [block.strip() for block in code_blocks(README, "sh", "bash", "console", "")] == SETUP_COMMANDS
    assert README.count("pip install") == 2


BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}:{number}")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, block in enumerate(code_blocks(path.read_text(), "python"), 1)
    # not-working.md has fragments around a reader's model, which examples/not_working.py runs. tests/test_pages.py runs
    # how-to.md, numerics.md and the tutorials, whose blocks belong together.
    if path.name not in ("not-working.md", "how-to.md", "numerics.md")
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_examples_of_documents_run(need, block):
    packages = (("keras", "tensorflow"), ("torch", "torch"), ("jax", "jax"), ("flax", "flax"), ("sklearn", "sklearn"))
    for module, package in packages:
        if re.search(rf"^(import|from) (bnfast\.)?{module}\b", block, re.MULTILINE):
            need(package)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block, "example", "exec"), {})


def test_the_readme_is_short():
    assert len(README.split()) < 600
    for block in code_blocks(README, "python"):
        assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_links_between_documents_lead_somewhere():
    for path in (path for path in FILES if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_ci_runs_the_readme_test_command_literally():
    ci = ROOT / ".ci" / "run"
    assert SETUP_COMMANDS[1] in ci.read_text()
    assert ci.stat().st_mode & 0o100


def test_the_changelog_has_the_version():
    assert f"## [{bnfast.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_file_speaks_of_one_machine():
    # Folders of one machine, and settings of one package index. Written in pieces, so that this file passes too.
    words = [r"(?<![\w.])/(?:work|home|root|Users)/", "(?:index|extra-index)" + "-url", "trusted" + "-host"]
    assert naming("|".join(words), iter(FILES)) == set()


def test_one_word_is_gone():
    # It named both Keras's own layer and bnfast's TensorFlow op. Compiler flags may contain it, and quotes in docs/.
    word = re.compile(r"(?<!march=)\bnat" + r"ive\b", re.IGNORECASE)
    for path in FILES:
        text = path.read_text()
        if path.is_relative_to(ROOT / "docs"):
            text = re.sub(r"`[^`\n]*`", "", text)
        assert path.name == "CHANGELOG.md" or not word.search(text), path.relative_to(ROOT)


def test_tools_have_one_version():
    hooks = set(re.findall(r"(?:ruff|clang-format)==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert len(hooks) == 2
    assert all(f'"{hook}"' in (ROOT / "pyproject.toml").read_text() for hook in hooks)
