"""`bnfast run`: typical scripts run unmodified, and arguments, tracebacks and exit statuses are those of Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bnfast
import pytest
from bnfast.cli import keras_import, updates
from bnfast.cli.run import Patcher

SCRIPTS = Path(__file__).parents[1] / "scripts"
SOURCES = Path(bnfast.__file__).parents[1]


def bnfast_run(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bnfast", "run", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that bnfast itself wrote to stderr."""
    return [line.removeprefix("bnfast: ") for line in done.stderr.splitlines() if line.startswith("bnfast: ")]


def python(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.mark.parametrize(
    ("script", "args", "summary"),
    [
        ("mlp.py", [], ["2 batch norms: 2 trained on ", "1 of 2 trained batch norms had at most 116 updates"]),
        ("gan.py", [], ["2 batch norms: 2 trained on ", "2 of 2 trained batch norms had at most 10 updates"]),
        ("resume.py", ["."], ["6 batch norms: 6 trained on ", "6 of 6 trained batch norms had at most 40 updates"]),
        ("tf1.py", [], ["tf.layers.batch_normalization: 2 in graphs, computed by bnfast"]),
        (
            "cnn.py",
            ["--epochs", "4", "."],
            [
                "6 batch norms: 4 called in inference alone, 2 trained on ",
                "1 of 2 trained batch norms had at most 104 updates",
            ],
        ),
    ],
)
def test_scripts_run_unmodified(need, tmp_path, script, args, summary):
    need("tensorflow")
    need("sklearn")
    done = bnfast_run(SCRIPTS / script, *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *rest = said(done)
    assert first == f"running {SCRIPTS / script} with bnfast's batch norm in place of Keras's"
    assert len(rest) == len(summary), rest
    for line, start in zip(rest, summary, strict=True):
        assert line.startswith(start), rest


UPDATES = """
import keras, numpy as np
def main():
    norms = [keras.layers.BatchNormalization(), keras.layers.BatchNormalization(momentum={momentum})]
    model = keras.Sequential([keras.Input((4,)), *norms, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD({options}), "mse")
    model.fit(np.ones((80, 4), "float32"), np.ones((80, 1), "float32"), batch_size=4, epochs={epochs}, verbose=0)
main()
"""


@pytest.mark.parametrize(
    ("momentum", "epochs", "options", "line"),
    [
        (0.5, 1, "", "1 of 2 trained batch norms had at most 20 updates at momentum 0.99: 82% of their moving "),
        (0.999, 1, "", "2 of 2 trained batch norms had at most 20 updates at momentum 0.999: 98% of their moving"),
        (0.5, 6, "gradient_accumulation_steps=2", "1 of 2 trained batch norms had at most 120 updates"),
        (0.5, 18, "", None),
    ],
)
def test_too_few_updates_for_the_momentum_are_said(need, tmp_path, momentum, epochs, options, line):
    need("tensorflow")
    script = tmp_path / "train.py"
    script.write_text(UPDATES.format(momentum=momentum, epochs=epochs, options=options))
    done = bnfast_run(script)
    assert done.returncode == 0, done.stderr
    _, counts, *rest = said(done)
    assert counts == "2 batch norms: 2 trained on bnfast's TensorFlow op"
    assert len(rest) == (line is not None), rest
    assert line is None or rest[0].startswith(line), rest


FACTS = """
import sys, json
print(json.dumps([__name__, sys.argv, sys.path[0], __file__, __package__, __spec__ and __spec__.name]))
print(sys.modules["__main__"].__dict__ is globals())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of scripts that import nothing heavy."""
    files = {
        "facts.py": FACTS,
        "package/__init__.py": "",
        "package/__main__.py": FACTS,
        "package/part.py": FACTS,
        "app/__main__.py": FACTS,
        "exits.py": "import sys; sys.exit(int(sys.argv[1]))",
        "says.py": "import sys; sys.exit('a message')",
        "breaks.py": "def f():\n    raise KeyError('gone')\nf()\n",
        "typo.py": "x = = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "args",
    [
        ["facts.py", "--epochs", "3", "-m", "--quiet", "--", "-h"],
        ["package/part.py"],
        ["app", "x"],
        ["-m", "package", "--version"],
        ["-m", "package.part", "-q"],
        ["exits.py", "7"],
        ["exits.py", "0"],
        ["--", "facts.py", "--quiet"],
        ["says.py"],
        ["breaks.py"],
        ["typo.py"],
    ],
    ids=lambda args: " ".join(args),
)
def test_a_script_behaves_as_under_python(need, folder, args):
    need("tensorflow")
    expected, done = python(*args, cwd=folder), bnfast_run("--quiet", *args, cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (expected.returncode, expected.stdout, expected.stderr)


@pytest.mark.parametrize("args", [["facts.py"], ["-m", "package.part"]])
def test_a_safe_path_stays_safe(need, folder, args):
    """Under python -P no folder of the script's is searched. -m then needs the folder in PYTHONPATH."""
    need("tensorflow")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(SOURCES)])}
    found = [
        subprocess.run(
            [sys.executable, "-P", *words, *args], cwd=folder, env=environment, capture_output=True, text=True
        )
        for words in ([], ["-m", "bnfast", "run", "--quiet"])
    ]
    assert found[0].returncode == 0, found[0].stderr
    assert found[0].stdout == found[1].stdout


def test_what_keeps_keras_unpatched_is_the_reason(need, monkeypatch):
    need("tensorflow")
    keras = need("keras")
    patcher = Patcher()
    with monkeypatch.context() as patched:
        patched.setattr(keras.backend, "backend", lambda: "openvino")
        patcher.patch()
    assert patcher.summary()[0] == "nothing was replaced: Keras runs on openvino"
    monkeypatch.setitem(sys.modules, "bnfast.keras", None)
    patcher.patch()
    reason = "ModuleNotFoundError: import of bnfast.keras halted; None in sys.modules"
    assert patcher.summary()[0] == f"nothing was replaced: {reason}"
    assert patcher.too_few_updates() == []


def test_steps_that_jax_has_given_up_are_not_counted(need, monkeypatch):
    """As after an interrupt: fit gives a counter's memory to the next step."""
    need("keras")
    counter = need("jax").numpy.asarray(3)
    monkeypatch.setattr(updates, "_steps", [counter])
    assert updates.too_few([0.99])[0].startswith(
        "1 of 1 trained batch norms had at most 3 updates at momentum 0.99: 97%"
    )
    counter.delete()
    assert updates.too_few([0.99]) == []


def test_a_package_that_is_not_there_is_python_s_error(monkeypatch):
    """A script may try to import TensorFlow or Keras and go on without."""
    monkeypatch.setattr(keras_import, "WATCHED", ("absent_framework",))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    keras_import.AfterImport(lambda: pytest.fail("nothing was imported"))
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="No module named 'absent_framework'"):
            __import__("absent_framework")


def test_a_script_without_keras_imports_neither_keras_nor_tensorflow(need, folder):
    need("tensorflow")
    (folder / "light.py").write_text("import sys; assert not {'keras', 'tensorflow'} & set(sys.modules)")
    done = bnfast_run("light.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert said(done)[1:] == ["nothing was replaced: the script didn't import Keras"]
    assert len(said(bnfast_run("--no-summary", "light.py", cwd=folder))) == 1


@pytest.mark.parametrize("value", ["1", "True"])
def test_legacy_keras_is_named(need, folder, value):
    need("tensorflow")
    need("tf_keras")
    script = f"import os; os.environ['TF_USE_LEGACY_KERAS'] = {value!r}\nimport tensorflow as tf\n"
    (folder / "old.py").write_text(script + "tf.keras.layers.BatchNormalization()\n")
    done = bnfast_run("old.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    reason = f"tf_keras is in use because TF_USE_LEGACY_KERAS={value}, and is not Keras 3"
    assert said(done)[1:] == [f"nothing was replaced: {reason}"]


def test_a_backend_set_before_keras_is_imported_counts(need, folder):
    need("tensorflow")
    need("torch")
    script = "import os, numpy; os.environ['KERAS_BACKEND'] = 'torch'\nimport keras\n"
    script += "model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])\n"
    script += "model.compile('sgd', 'mse'); model.fit(numpy.ones((8, 3)), numpy.ones((8, 3)), verbose=0)\n"
    (folder / "other.py").write_text(script)
    done = bnfast_run("other.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert said(done)[1] == "1 batch norm: 1 trained on bnfast's kernels in PyTorch"


def test_an_interrupt_has_the_traceback_and_status_of_python(need, folder):
    need("tensorflow")
    (folder / "waits.py").write_text("raise KeyboardInterrupt")
    done = bnfast_run("--quiet", "waits.py", cwd=folder)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "run: a script or -m MODULE is needed. usage: bnfast run"),
        (["-m"], "run: a script or -m MODULE is needed. usage: bnfast run"),
        (["--fast", "x.py"], "run: unknown option --fast. usage: bnfast run"),
        (["absent.py"], "run: can't open absent.py: No such file or directory"),
        (["-m", "absent"], "run: no module named absent"),
        (["-m", "absent.part"], "run: no module named absent.part"),
        (["-m", "sys"], "run: sys has no Python code"),
    ],
)
def test_errors_are_one_line(need, folder, args, message):
    need("tensorflow")
    done = bnfast_run(*args, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"bnfast: {message}")
    assert done.stderr.count("\n") == 1


def test_help(need):
    done = bnfast_run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(part in done.stdout for part in ("SCRIPT", "-m MODULE", "--no-summary", "--quiet"))


@pytest.mark.parametrize("redirection", ["2> /dev/full", "2>&-", "> /dev/full", ">&-"])
def test_the_script_runs_where_the_terminal_cannot_be_written(need, folder, redirection):
    """With the status and effects that it has under Python: bnfast's lines are lost, and nothing else."""
    need("tensorflow")
    (folder / "ran.py").write_text("import sys\nopen(sys.argv[1], 'w').close()\n")
    for name, words in {"ours": ["-m", "bnfast", "run"], "python's": []}.items():
        command = ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, *words, "ran.py", name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert (folder / name).exists()
        assert done.stdout == ""


def test_a_forked_child_prints_no_summary(need, folder):
    need("tensorflow")
    (folder / "forks.py").write_text("import os, sys\nif os.fork() == 0:\n    sys.exit(0)\nos.wait()\n")
    assert len(said(bnfast_run("forks.py", cwd=folder))) == 2


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_processes_that_bnfast_does_not_reach_are_named(need, folder, method):
    need("tensorflow")
    script = "import multiprocessing, os\nif __name__ == '__main__':\n"
    script += f"    process = multiprocessing.get_context({method!r}).Process(target=os.getpid)\n"
    script += "    process.start()\n    process.join()\n"
    (folder / "starts.py").write_text(script)
    named = "processes that multiprocessing spawned aren't covered: Keras's own layer runs there"
    assert said(bnfast_run("starts.py", cwd=folder))[2:] == ([] if method == "fork" else [named])


def test_a_broken_module_has_python_s_message(need, folder):
    need("tensorflow")
    (folder / "broken.py").write_text("x = = 1\n")
    done = bnfast_run("--quiet", "-m", "broken", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == python("-m", "broken", cwd=folder).stderr.splitlines()[-1]
    assert "bnfast" not in done.stderr


@pytest.mark.needs("tensorflow", "keras")
@pytest.mark.parametrize("module", ["tensorflow", "keras"])
def test_a_missing_package_is_named(folder, module):
    code = (
        f"import sys; sys.modules[{module!r}] = None; from bnfast.cli import main; sys.exit(main(['run', 'facts.py']))"
    )
    done = python("-c", code, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'bnfast: this needs {module}, not installed here: pip install "bnfast[keras]"\n'
