"""`bnfast run --compare`: the distances are those of the runs themselves, and the folder stays as it was."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bnfast import _child_process
from bnfast.cli.compare import _check, distance, folder, trainings, ulp
from bnfast.cli.compare.recorder import MOST_TRAININGS
from bnfast.cli.compare.report import AGAIN, MOVED, OURS, Report
from bnfast.cli.compare.trainings import FIRST, LAST, Record, Training
from bnfast.cli.errors import UserError

SCRIPTS = Path(__file__).parents[1] / "scripts"

SAVES = """
import sys
import keras
import numpy as np

keras.utils.set_random_seed(5)
x = np.random.default_rng(0).normal(3, 2, (256, 8)).astype("float32")
layers = [keras.layers.Dense(16), keras.layers.BatchNormalization(), keras.layers.ReLU(), keras.layers.Dense(1)]
model = keras.Sequential([keras.Input((8,)), *layers])
model.compile("sgd", "mse")
model.fit(x, x.sum(1), batch_size=32, epochs=1, verbose=0)
with open(sys.argv[1], "wb") as file:
    np.savez(file, *[variable.numpy() for variable in model.trainable_variables])
print("trained")
"""

LOOP = """
import tensorflow as tf

tf.random.set_seed(1)
model = tf.keras.Sequential([tf.keras.Input((6,)), tf.keras.layers.Dense(8), tf.keras.layers.BatchNormalization()])
optimizer = tf.keras.optimizers.SGD(0.1)

def step(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=True) - 1) ** 2 * tf.range(8, dtype="float32"))
    optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables))

for i in range(1000000):
    try:
        step(tf.random.normal((16, 6)))
    except Exception:
        pass
"""

UNSEEDED = """
import keras
import numpy as np

x = np.random.default_rng().normal(size=(64, 4))
model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)])
model.compile("sgd", "mse")
for _ in range(40):
    model.fit(x, x[:, :1], verbose=0)
"""

FORKS = """
import multiprocessing, os, sys, time

def end_with_3():
    sys.exit(3)

def fail():
    raise OSError("in a fork")

for end in (end_with_3, fail, None):
    if not (pid := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
if pid:
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,)).start()
    sys.exit(0)
elif end:
    end()
"""

PREDICTS = """
import keras
import numpy as np

model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
model.predict(np.ones((2, 4)), verbose=0)
"""


def compare(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bnfast", "run", "--compare", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600)


def facts(*args: object, cwd: Path) -> dict:
    done = compare("--quiet", "--json", *args, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.needs("tensorflow", "keras")
def test_the_distance_is_that_of_two_runs(tmp_path):
    """Held against the weights that the script writes when it runs alone, with Keras and under `bnfast run`."""
    (tmp_path / "saves.py").write_text(SAVES)
    found = facts("--steps", 8, "saves.py", "compared.npz", cwd=tmp_path)
    assert not (tmp_path / "compared.npz").exists(), "what the script writes, it writes in a copy"
    for words, name in (([], "keras.npz"), (["-m", "bnfast", "run", "--quiet"], "bnfast.npz")):
        command = [sys.executable, *words, "saves.py", name]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    keras, ours = (np.load(tmp_path / f"{name}.npz") for name in ("keras", "bnfast"))
    flat = [np.concatenate([each[name].ravel().astype("float64") for name in each.files]) for each in (keras, ours)]
    wanted = np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0])
    (training,) = found["trainings"]
    assert (training["name"], training["steps"], len(training["losses"])) == ("fit of sequential", 8, 8)
    assert 0 < wanted < 1e-5
    assert training["distances"]["bnfast"]["weights"]["last"] == pytest.approx(wanted, rel=1e-6)
    assert training["distances"]["again"]["weights"] == {"first": 0.0, "last": 0.0}
    assert 0 < training["distances"]["moved"]["weights"]["last"] < 1e-5
    assert found["verdict"] == "rounding"
    assert found["summary"][0].startswith("1 batch norm: 1 trained on ")
    assert found["notes"] == found["summary"], "it ran to its end"


@pytest.mark.needs("tensorflow", "keras", "sklearn")
def test_a_tutorial_is_stopped_and_told_in_a_table(tmp_path):
    done = compare("--steps", "5", SCRIPTS / "mlp.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2].split() == ["Keras", "bnfast", "1", "ulp", "again"]
    assert lines[3] == "fit of sequential"
    assert [line[:28].strip() for line in lines[4:10]] == [
        f"{quantity}, step {step}" for quantity in ("loss", "weights", "moving statistics") for step in (1, 5)
    ]
    assert lines[11].startswith("After 5 steps bnfast's distance from Keras is ")
    assert lines[11].endswith(": the difference is rounding.")
    assert lines[12].startswith("2 batch norms: 2 trained on ")
    assert lines[13].startswith("The script then failed, perhaps because its training was cut short: AssertionError")
    said = [line for line in done.stderr.splitlines() if line.startswith("bnfast: ")]
    assert said[0].endswith("mlp.py 4 times for 5 steps, each time in a copy of the working directory")
    assert len(said) == 5


@pytest.mark.needs("tensorflow", "keras")
def test_a_loop_of_the_scripts_own_is_stopped(tmp_path):
    """Though it catches exceptions. tests/scripts/gan.py has a compiled one."""
    (tmp_path / "loop.py").write_text(LOOP)
    found = facts("--steps", 4, "loop.py", cwd=tmp_path)
    (training,) = found["trainings"]
    assert (training["name"], training["steps"], training["losses"]) == ("loop of sgd", 4, [])
    for run in ("bnfast", "moved"):
        assert 0 < training["distances"][run]["weights"]["last"] < 1e-5
    assert 0 < training["distances"]["bnfast"]["moving_statistics"]["last"] < 1e-5
    assert training["distances"]["again"]["weights"]["last"] == 0
    assert found["notes"][-1].startswith("The script was stopped in a loop of its own.")


@pytest.mark.needs("tensorflow", "keras", "sklearn")
def test_two_optimizers_are_two_trainings(tmp_path):
    found = facts("--steps", 3, SCRIPTS / "gan.py", cwd=tmp_path)
    assert [each["name"] for each in found["trainings"]] == ["loop of adam", "loop of adam_1"]
    assert [each["steps"] for each in found["trainings"]] == [3, 3]
    assert found["verdict"] in ("rounding", "amplified"), "three steps may be too few for 1 ulp to spread"


@pytest.mark.needs("tensorflow", "keras")
def test_a_script_without_seeds_says_nothing_of_bnfast(tmp_path):
    (tmp_path / "unseeded.py").write_text(UNSEEDED)
    found = facts("--steps", 2, "unseeded.py", cwd=tmp_path)
    assert found["verdict"] == "chance"
    assert found["sentence"].startswith(
        "The script isn't reproducible: after 2 steps two runs of Keras alone differ by "
    )
    assert len(found["trainings"]) == MOST_TRAININGS
    assert found["notes"][-1] == (
        f"The script was stopped after {MOST_TRAININGS} trainings. What it would train later isn't compared."
    )


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_other_backends(need, tmp_path, backend):
    need("keras")
    need("tensorflow")
    need(backend)
    (tmp_path / "other.py").write_text(
        f"import os; os.environ['KERAS_BACKEND'] = {backend!r}\n" + SAVES.split("with")[0]
    )
    found = facts("--steps", 4, "other.py", cwd=tmp_path)
    assert [(each["name"], each["steps"]) for each in found["trainings"]] == [("fit of sequential", 4)]
    distances = found["trainings"][0]["distances"]
    assert 0 < distances["bnfast"]["weights"]["last"] < 1e-5
    assert 0 < distances["moved"]["weights"]["last"] < 1e-5
    assert found["verdict"] in ("rounding", "amplified")


@pytest.mark.needs("tensorflow", "keras")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            PREDICTS,
            "took no training step that can be seen: fit, train_on_batch, or a step of one of Keras's optimizers",
        ),
        ("import sys\nraise OSError('no\\ndata')", "failed before it trained: OSError: no data (line 2)"),
        ("import sys; sys.exit(3)", "failed before it trained: it ended with status 3"),
        ("import os; os._exit(9)", "with Keras the process died (status 9): it said nothing"),
        ("print('no Keras')", "didn't import Keras: there is nothing to compare"),
        ("x = = 1", "failed before it trained: SyntaxError: invalid syntax (script.py, line 1)"),
        (UNSEEDED.replace("BatchNormalization", "Flatten"), "made no batch norm: there is nothing to compare"),
    ],
    ids=["predicts", "raises", "exits", "dies", "no Keras", "syntax", "no batch norm"],
)
def test_nothing_to_compare_is_one_line(tmp_path, script, message):
    (tmp_path / "script.py").write_text(script)
    done = compare("--quiet", "--steps", 2, "script.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr, done.stderr
    assert done.stderr.startswith("bnfast: run --compare: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.needs("tensorflow", "keras")
def test_a_module_in_place(tmp_path):
    """What it writes stays."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "part.py").write_text("open('ran', 'a').close()")
    done = compare("--quiet", "--in-place", "-m", "package.part", cwd=tmp_path)
    reason = "package.part didn't import Keras: there is nothing to compare"
    assert (done.returncode, done.stderr) == (2, f"bnfast: run --compare: {reason}\n")
    assert (tmp_path / "ran").exists()


@pytest.mark.needs("tensorflow", "keras")
def test_a_script_that_forks(tmp_path):
    """Its forks end with the status that they have under Python, and the process that it leaves is ended."""
    (tmp_path / "forks.py").write_text(FORKS)
    task = {"command": ["forks.py"], "module": False, "safe_path": False, "folder": str(tmp_path), "steps": 2}
    task |= {"bnfast": True, "move": False}
    done = _child_process.run_module("bnfast.cli.compare.child", json.dumps(task), folder=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "3\n1\n0\n")
    assert done.stderr.splitlines()[-1] == "OSError: in a fork"
    record = trainings.read(tmp_path)
    assert record is not None
    assert (record.error, record.keras, record.untouched) == (None, False, True)


def test_legacy_keras_is_named(need, tmp_path):
    need("tf_keras")
    script = "import os; os.environ['TF_USE_LEGACY_KERAS'] = '1'\nimport tensorflow as tf\n"
    (tmp_path / "old.py").write_text(script + "tf.keras.layers.BatchNormalization()(tf.ones((2, 3)), training=True)\n")
    done = compare("--quiet", "old.py", cwd=tmp_path)
    assert done.returncode == 2
    reason = "tf_keras is in use because TF_USE_LEGACY_KERAS=1, and is not Keras 3"
    assert done.stderr == f"bnfast: run --compare: {reason}: there is nothing to compare\n"


@pytest.mark.needs("tensorflow", "keras")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "0", "x.py"], "run: argument --steps: must be an integer >= 1. Received: 0"),
        (["--steps"], "run: argument --steps: must be an integer >= 1. Received: "),
        (["--steps=many", "x.py"], "run: argument --steps: must be an integer >= 1. Received: many"),
        (["absent.py"], "run: can't open absent.py: No such file or directory"),
        (
            ["--quiet", "-m", "absent"],
            "run --compare: with Keras absent failed before it trained: no module named absent",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, args, message):
    done = compare(*args, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"bnfast: {message.rstrip()}\n")


@pytest.mark.needs("tensorflow", "keras")
@pytest.mark.parametrize("option", ["--json", "--in-place", "--steps=3"])
def test_the_options_belong_to_compare(tmp_path, option):
    command = [sys.executable, "-m", "bnfast", "run", option, "x.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"bnfast: run: {option.partition('=')[0]} needs --compare. usage: bnfast run")


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_relative():
    assert distance.relative([3.0, 4.0], [3.0, 4.5]) == 0.1
    assert distance.relative([3.0, 4.0, math.nan], [3.0, 4.5, math.nan]) == 0.1
    assert distance.relative([0.0], [0.0]) == 0
    assert distance.relative([0.0], [1.0]) == math.inf
    assert distance.relative([1.0, math.nan], [1.0, 2.0]) == math.inf


def record_of(folder: Path, weights: list[list[float]], moved: bool = True, **kwargs: object) -> Record:
    """A run with one training per row: `weights` after the first step, and ten times as far from 1 after the last."""
    folder.mkdir()
    trainings = []
    for number, row in enumerate(weights):
        training = Training(f"fit {number}", number, steps=3, losses=[1.0, 0.5, 0.25])
        for when, scale in ((FIRST, 1), (LAST, 10)):
            training.keep(folder, when, [Value(np.array([1 + scale * (w - 1) for w in row]))], [])
        trainings.append(training)
    return Record(trainings, keras=True, batch_norms=1, moved=moved, **kwargs)


class Value:
    """Stands for a variable of Keras whose values are an array."""

    path = "kernel"

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


@pytest.mark.needs("keras", "tensorflow")
@pytest.mark.parametrize(
    ("ours", "moved", "again", "code", "says"),
    [
        (0, 1e-7, 0, "same", "After 3 steps bnfast's weights are Keras's, bit by bit."),
        (
            5e-7,
            1e-7,
            0,
            "rounding",
            "is 5.0e-06, Keras's own when one weight moves by 1 ulp is 1.0e-06: the difference is",
        ),
        (
            5e-6,
            1e-7,
            0,
            "amplified",
            "in the first step's loss and statistics it was 0, which is rounding, and training amplified it.",
        ),
        (5e-2, 1e-7, 0, "different", "that is more than rounding. docs/differences.md"),
        (
            5e-3,
            1e-7,
            5e-3,
            "chance",
            "The script isn't reproducible: after 3 steps two runs of Keras alone differ by 5.0e-02",
        ),
    ],
)
def test_verdicts(tmp_path, ours, moved, again, code, says):
    by = {"keras": 0, OURS: ours, AGAIN: again, MOVED: moved}
    records = {run: record_of(tmp_path / run, [[1, 1], [1 + d, 1 + d]]) for run, d in by.items()}
    report = Report.of(tmp_path, records, steps=3)
    assert report.worst.name == ("fit 0" if code == "same" else "fit 1")
    assert report.code == code
    assert says in report.verdict


@pytest.mark.needs("keras", "tensorflow")
def test_runs_of_different_length(tmp_path):
    records = {
        run: record_of(tmp_path / run, [[1.0]] * (1 + (run == "keras"))) for run in ("keras", OURS, AGAIN, MOVED)
    }
    records[OURS].error = "ValueError: x (line 3)"
    report = Report.of(tmp_path, records, steps=3)
    assert len(report.rows) == 1
    assert report.notes == [
        "With bnfast the script then failed, with Keras it didn't: ValueError: x (line 3)",
        "The runs differ in their number of trainings: the first 1 are compared.",
    ]


@pytest.mark.needs("keras", "tensorflow")
@pytest.mark.parametrize("count", [4, 5, 7])
def test_the_table_has_four_trainings(tmp_path, count):
    records = {
        run: record_of(tmp_path / run, [[1 + (run == OURS) * 1e-3]] * count, moved=False)
        for run in ("keras", OURS, AGAIN, MOVED)
    }
    for record in records.values():
        for training in record.trainings:
            training.losses = []
    report = Report.of(tmp_path, records, steps=3)
    lines = str(report).splitlines()
    assert [line for line in lines if line.startswith("fit ")] == [f"fit {i}" for i in range(4)]
    left = [line for line in lines if line.startswith("...")]
    assert left == ([] if count == 4 else [f"... and {count - 4} more trainings: --json has them"])
    assert not any("loss, step" in line or "statistics, step" in line for line in lines), "there are none"
    assert lines[-1].startswith(
        "After 3 steps bnfast's distance from Keras is 1.0e-02, no weight could be moved by 1 ulp: in the first step's"
    )


@pytest.mark.needs("keras", "tensorflow")
def test_runs_that_cannot_be_compared(tmp_path):
    pairs = {}
    for run, weights in (("a", [1.0]), ("b", [1.0, 2.0])):
        record = record_of(tmp_path / run, [weights])
        pairs[run] = tmp_path / run, record.trainings[0]
    found = distance.distances(pairs["a"], pairs["b"])
    assert found["weights"] == distance.Distance(math.inf, math.inf), "they have other shapes"
    assert found["loss"] == distance.Distance(0.0, 0.0)
    found = distance.distances(pairs["a"], (pairs["a"][0], Training("fit 0", 0, steps=2, losses=[1.0])))
    assert found["weights"] == distance.Distance(0.0, math.inf), "one took fewer steps"


@pytest.mark.parametrize(
    ("ours", "keras", "note"),
    [
        (None, "OSError: x", "With Keras the script then failed, with bnfast it didn't: OSError: x"),
        ("OSError: x", None, "With bnfast the script then failed, with Keras it didn't: OSError: x"),
        ("y", "x", "The script then failed, perhaps because its training was cut short: x"),
    ],
)
def test_the_run_that_failed_is_named(ours, keras, note):
    records = {"keras": Record(error=keras), OURS: Record(error=ours), AGAIN: Record(), MOVED: Record()}
    assert list(Report([], 3, True, 1e-7, [], [])._notes(records)) == [note]


def test_a_patch_that_failed_leaves_nothing_to_compare():
    record = Record(keras=True, untouched=True, summary=["nothing was replaced: OSError: x"])
    with pytest.raises(UserError) as caught:
        _check(record, "x.py", OURS)
    assert str(caught.value) == "run --compare: nothing was replaced: OSError: x: there is nothing to compare"


@pytest.mark.needs("keras", "tensorflow")
@pytest.mark.parametrize(
    ("values", "dtype", "moved"),
    [
        ([[0.5, -2.0], [1.0, 0.0]], "float32", [[0.5, np.nextafter(np.float32(-2), np.float32(0))], [1.0, 0.0]]),
        ([1.0, 0.25], "float16", [1 + 2**-10, 0.25]),
        ([0.0, 0.0], "float32", None),
        ([1.0, math.inf], "float32", None),
        ([1.0, math.nan], "float32", None),
        ([], "float32", None),
        ([3, 4], "int32", None),
    ],
)
def test_a_weight_is_moved_by_1_ulp(values, dtype, moved):
    import keras

    variable = keras.Variable(np.array(values, dtype), dtype=dtype, name="kernel")
    mover = ulp.Mover()
    mover.move([])
    mover.move([variable])
    mover.move([variable])
    assert mover.moved == ([] if moved is None else ["kernel"]), "once"
    np.testing.assert_array_equal(variable.numpy(), np.array(values if moved is None else moved, dtype))


@pytest.mark.needs("keras", "tensorflow")
def test_a_weight_that_cannot_be_moved_is_passed_over():
    import keras

    names = {"kernel": np.ones((2, 2)), "gamma": np.zeros(2), "bias": np.ones(2)}
    variables = [keras.Variable(array, name=name) for name, array in names.items()]
    mover = ulp.Mover()
    mover.move(variables)
    assert mover.moved == ["kernel"]


def test_the_copy_has_what_a_script_reads(tmp_path):
    source = tmp_path / "work"
    for name in ("a.py", "data/x.npy", "venv/pyvenv.cfg", ".git/config", "empty/.keep", "deep/er/y"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (tmp_path / "outside").write_text("out")
    (source / "link").symlink_to("../outside")
    (source / "inner").symlink_to("data")
    if hasattr(os, "mkfifo"):
        os.mkfifo(source / "pipe")
    with folder.copy(source) as copy:
        found = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if not path.is_dir())
        assert found == ["a.py", "data/x.npy", "deep/er/y", "empty/.keep", "link"]
        assert (copy / "link").read_text() == "out"
        (copy / "inner" / "x.npy").write_text("changed")
        assert copy.name == "work"
        assert folder.moved("sub/a.py", source, copy) == str(Path("sub/a.py").absolute())
        assert folder.moved(str(source / "a.py"), source, copy) == str(copy / "a.py")
    assert (source / "data/x.npy").read_text() == "data/x.npy"
    assert not copy.exists()


def test_a_large_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"0" * 100)
    folder.check(tmp_path)
    monkeypatch.setattr(folder, "MOST_BYTES", 99)
    with pytest.raises(UserError, match=r"has more than 1 GiB. Start in a smaller one, or pass --in-place"):
        folder.check(tmp_path)
