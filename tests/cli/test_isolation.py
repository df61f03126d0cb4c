"""The command executes nothing that lies in the working directory: neither in its own process nor in those it starts.

A trap is a module that ends the process. The folder of traps is the working directory of each command here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bnfast
import pytest
from bnfast import _child_process
from bnfast.benchmark import model_memory, models

SOURCES = Path(bnfast.__file__).parents[1]
TRAPS = ("ctypes", "json", "numpy", "bnfast", "struct", "importlib", "random", "rich", "matplotlib", "keras", "csv")
SCRIPT = "import sys\nfrom bnfast.cli import main\nsys.exit(main())\n"


@pytest.fixture
def traps(tmp_path: Path) -> Path:
    folder = tmp_path / "traps"
    folder.mkdir()
    for name in (*TRAPS, "sitecustomize"):
        (folder / f"{name}.py").write_text(f"import os\nos.write(2, b'executed {name}.py')\nos._exit(99)\n")
    (folder / "matplotlibrc").write_text("font.size: 44\n")
    return folder


def command(tmp_path: Path, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as an installed `bnfast` runs: a script in a folder of its own."""
    script = tmp_path / "bin" / "bnfast"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT)
    words = [sys.executable, script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), **environment}
    return subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_info_executes_nothing_in_the_working_directory(need, tmp_path, traps):
    need("tensorflow")
    done = command(tmp_path, "info", "--json", cwd=traps)
    assert (done.returncode, done.stderr) == (0, "")
    bridge = json.loads(done.stdout)["bridge"]
    assert bridge == json.loads(command(tmp_path, "info", "--json", cwd=tmp_path).stdout)["bridge"]
    assert bridge["name"] == "op" or sys.platform != "linux"


def test_python_m_executes_what_python_itself_needs_and_no_more(need, tmp_path, traps):
    """Python searches the working directory until bnfast's first line runs; NumPy is imported by then."""
    need("tensorflow")
    for name in TRAPS:
        if name in ("numpy", "bnfast", "ctypes", "json", "struct", "importlib", "random", "csv"):
            (traps / f"{name}.py").rename(traps / f"{name}.txt")
    for name in ("argparse", "fractions", "json"):
        (traps / f"{name}.py").write_text("import os\nos._exit(99)\n")
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    words = [sys.executable, "-m", "bnfast", "info"]
    done = subprocess.run(words, cwd=traps, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not model_memory.available(), reason="this system does not report peak memory")
def test_the_memory_benchmark_executes_nothing_in_the_working_directory(traps, monkeypatch):
    """Nor where sys.path has an entry for it, as in a notebook. The child fails at the model's name, not in a trap."""
    monkeypatch.chdir(traps)
    monkeypatch.syspath_prepend("")
    assert model_memory._run_child(models.Spec("not a name"), "keras", None) == "ValueError: not a name"


@pytest.mark.serial
def test_demo_executes_nothing_in_the_working_directory(need, tmp_path, traps):
    need("tensorflow")
    need("sklearn")
    picture = tmp_path / "demo.png"
    done = command(tmp_path, "demo", "--epochs", "1", "--batch", "1437", "--out", picture, cwd=traps)
    assert (done.returncode, done.stderr) == (0, "")
    assert picture.stat().st_size > 50_000


@pytest.mark.parametrize("found_by", ["PYTHONPATH", "sys.path", "a finder"])
def test_a_child_imports_the_package_that_runs_here(tmp_path, found_by):
    """However it was found: by an environment variable, by a script's own line, or as an editable installation does."""
    package = tmp_path / "elsewhere"
    package.mkdir()
    (package / "bnfast").symlink_to(SOURCES / "bnfast")
    find = {
        "PYTHONPATH": "",
        "sys.path": f"sys.path.insert(0, {str(package)!r})",
        "a finder": f"""
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "bnfast":
            file, folder = {str(package / "bnfast" / "__init__.py")!r}, {str(package / "bnfast")!r}
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[folder])
sys.meta_path.insert(0, Finder())
""",
    }[found_by]
    code = f"""
import importlib.util, sys
{find}
from bnfast import _child_process
code = "from bnfast import _core; print(package.__file__, _core.__file__, sys.argv[1:])"
print(_child_process.run(code, "a b").stdout)
"""
    environment = {**os.environ, "PYTHONPATH": str(package) if found_by == "PYTHONPATH" else ""}
    words = [sys.executable, "-P", "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, core, arguments = done.stdout.split(maxsplit=2)
    assert first == str(package / "bnfast" / "__init__.py")
    assert Path(core).parent == package / "bnfast"
    assert arguments.strip() == "['a b']"


def test_a_child_has_this_process_s_path_and_isolation():
    done = _child_process.run(
        "print(sys.flags.safe_path, sys.path == eval(sys.argv[1]))", repr([p for p in sys.path if p])
    )
    assert done.stdout == "True True\n"
    code = f"import sys; sys.path.insert(0, {str(SOURCES)!r}); from bnfast import _child_process as c; "
    code += "print(c.run('print(sys.flags.isolated)').stdout)"
    words = [sys.executable, "-I", "-c", code]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == "1"


def test_nothing_else_starts_a_process():
    """One door: a second one would have to repeat what it does."""
    words = ("import subprocess", "from subprocess", "os.system(", "os.popen(", "os.spawn", "os.exec", "posix_spawn(")
    found = {
        str(path.relative_to(SOURCES / "bnfast"))
        for path in (SOURCES / "bnfast").rglob("*.py")
        if any(word in path.read_text() for word in words)
    }
    assert found == {"_child_process.py"}


def test_a_script_meets_no_module_of_its_folder_through_bnfast(need, tmp_path):
    """Everything that bnfast imports beyond the script's own imports is imported before the script's folder counts."""
    need("tensorflow")
    folder = tmp_path / "script"
    folder.mkdir()
    code = "import sys, keras, tensorflow; before = set(sys.modules); import bnfast.keras; bnfast.keras.patch()\n"
    code += "print(*{name.split('.')[0] for name in set(sys.modules) - before} - {'bnfast'})"
    words = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    later = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=300, check=True
    ).stdout.split()
    for name in {*later, "bnfast", "argparse"}:
        (folder / f"{name}.py").write_text("import os\nos._exit(99)\n")
    (folder / "script.py").write_text("import keras\nassert keras.layers.BatchNormalization.__module__ != 'keras'\n")
    done = command(tmp_path, "run", "--no-summary", folder / "script.py", cwd=folder)
    assert done.returncode == 0, done.stderr
