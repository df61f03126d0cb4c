"""The rules of the house that a test can check: who may name what, sizes, documents, and the README's own code."""

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
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SETUP_COMMANDS = ['pip install ".[demo]" && bnfast demo', 'pip install ".[test]" && pytest']
MOST_LINES = 350  # "about 300": past this a file holds a second noun
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


def test_files_stay_short():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in under("csrc", "python", "tests")
    }
    assert {name: count for name, count in lengths.items() if count > MOST_LINES} == {}


def test_only_parallel_names_openmp():
    found = naming(r"\bomp_\w+|#\s*pragma\s+omp|<omp\.h>|\b_OPENMP\b", under("csrc"))
    assert {name for name in found if not re.fullmatch(r"csrc/cpu/parallel\.\w+|csrc/tests/.*", name)} == set()


def test_only_the_binding_names_pybind11():
    found = naming("pybind11|<Python.h>", (path for path in under("csrc") if path.suffix in CPP))
    assert {name for name in found if not name.startswith("csrc/bind/")} == set()


def imported_modules(path: Path) -> Iterator[str]:
    """The top-level packages a Python file imports anywhere, `from . import` aside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


HEAVY = ("compat", "keras", "tensorflow", "cli", "benchmark")


def test_only_keras_the_command_and_the_benchmark_import_tensorflow():
    for path in under("python"):
        if path.suffix == ".py" and path.relative_to(ROOT / "python" / "bnfast").parts[0] not in HEAVY:
            assert not {"tensorflow", "tf_keras", "keras"} & set(imported_modules(path)), path


def test_importing_bnfast_imports_nothing_heavy():
    code = (
        "import sys, bnfast; "
        "print(*{'tensorflow', 'keras', 'torch', 'matplotlib', 'rich', 'sklearn', 'scipy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


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


@pytest.mark.parametrize("block", code_blocks(README, "python"), ids=["numpy", "keras", "model"])
def test_the_readme_examples_run(need, block):
    if "bnfast.keras" in block:
        need("tensorflow")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block, "README.md", "exec"), {})


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
