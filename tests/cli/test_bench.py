"""`bnfast bench`: what it writes, which peers it leaves out, what it rejects, and that it notices a wrong result.

No test here asserts a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import bnfast
import numpy as np
import pytest
from bnfast.benchmark import allocator, cases, correctness, figure, machine, report, timing
from bnfast.benchmark.machine import others_busy
from bnfast.benchmark.peers import BASELINES, PEERS, Unsupported
from bnfast.benchmark.peers import jax as jax_peer
from bnfast.cli import bench, main, names

pytestmark = pytest.mark.serial  # measures time

OTHERS = [name for name in bench.TITLES if name not in BASELINES]
CASE_KEYS = ("shape", "set", "N", "C", "spatial", "layout", "op", "dtype", "bytes")
MEASUREMENT_KEYS = ("peer", "mode", "rounds", "calls", "seconds", "quartiles", "ratio", "to_copy")


def make_case(op="train", layout="channels_last", dtype="float32", shape="4,6,5x3") -> cases.Case:
    return cases.Case(cases.parse_shape(shape), layout, op, dtype)


@pytest.fixture(autouse=True)
def default_threads():
    """Peers change the number of threads, that of bnfast too."""
    yield
    bnfast.set_num_threads(None)


@pytest.fixture
def short(monkeypatch):
    """One call per piece and no waiting, since the times don't matter here."""
    monkeypatch.setattr(timing, "PIECE_SECONDS", 0.0)
    monkeypatch.setattr(timing, "wait_for_idle_threads", lambda: None)


@pytest.mark.needs("matplotlib", "rich")
def test_the_command_with_all_installed_peers(tmp_path):
    """Runs in a new process, since TensorFlow's threads can be set only once."""
    folder = tmp_path / "new" / "folder"
    command = ["bench", "--quick", "--shape", "4,6,3x3", "--threads", "2", "--layout", "channels_last", "--out", folder]
    done = subprocess.run([sys.executable, "-m", "bnfast", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads((folder / "bench.json").read_text())
    assert found["schema"] == report.SCHEMA
    assert found["machine"]["threads"] == 2
    assert {"cpu", "cores", "isa", "l2_bytes", "l3_bytes", "versions"} <= set(found["machine"])
    assert {row["op"] for row in found["rows"]} == set(cases.OPS)
    for row in found["rows"]:
        assert set(row) == {*CASE_KEYS, *MEASUREMENT_KEYS}
        assert row["seconds"] > 0
        assert row["rounds"] == bench.QUICK_ROUNDS
        assert (row["ratio"] is None) == (row["peer"] == "copy")
        assert row["to_copy"] > 0
    present, missing = set(found["settings"]["peers"]), set(found["settings"]["missing"])
    assert present | missing == set(bench.TITLES)
    assert {row["peer"] for row in found["rows"]} == present, found["left_out"]
    assert found["left_out"] == []
    for name in missing:
        assert name in done.stdout.splitlines()[0]
    text = (folder / "bench.md").read_text()
    assert all(f"## {op}, float32" in text for op in cases.OPS)
    assert "4x6x3x3" in text
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "Time over bnfast's" in done.stdout


@pytest.mark.needs("matplotlib", "rich")
def test_missing_peers_are_named_in_one_line(capsys, monkeypatch, short):
    for module in ("torch", "tensorflow", "keras", "jax"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["bench", "--quick", "--shape", "8,32"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"not installed, left out: {', '.join(OTHERS)}"


def test_no_peer_is_imported_before_it_is_created():
    code = (
        "import sys, bnfast.cli.bench, bnfast.benchmark.peers; "
        "print(*{'tensorflow', 'keras', 'torch', 'jax', 'rich', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "resnet51"], "argument --set: must be all, or some of resnet50, "),
        (["--set", ""], "argument --set: must be all, or some of resnet50, "),
        (["--set", ""], "Received: ''"),
        (["--shape", "8"], "argument --shape: must be N,C or N,C,HxW, each >= 1. Received: '8'"),
        (["--shape", "8,0"], "Received: '8,0'"),
        (["--shape", "8,3,4x"], "Received: '8,3,4x'"),
        (["--shape", "8,3,4,4"], "Received: '8,3,4,4'"),
        (["--op", "train,backward"], "argument --op: must be all, or some of train, grad, infer. Received: 'backward'"),
        (["--layout", "nchw"], "argument --layout: must be all, or some of channels_first, channels_last"),
        (["--dtype", "int8"], "argument --dtype: must be all, or some of float32, "),
        (["--peers", "onednn"], "argument --peers: must be all, or some of tensorflow, "),
        (["--outputs", "cold"], "argument --outputs: must be all, or some of fresh, held, reused, warm"),
        (["--threads", "0"], "argument --threads: must be an integer >= 1. Received: 0"),
        (["--rounds", "many"], "argument --rounds: must be an integer >= 1. Received: many"),
    ],
)
def test_errors_name_the_accepted_values(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


@pytest.mark.needs("matplotlib", "rich")
def test_a_folder_that_cannot_be_written_is_rejected_before_measuring(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert main(["bench", "--quick", "--shape", "8,32", "--out", str(tmp_path / "file" / "folder")]) == 2
    assert capsys.readouterr().err.startswith("bnfast: argument --out: ")


@pytest.mark.needs("matplotlib", "rich")
@pytest.mark.parametrize(("module", "arguments"), [("rich", []), ("matplotlib", ["--out", "somewhere"])])
def test_a_missing_extra_is_named(capsys, monkeypatch, module, arguments):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["bench", "--shape", "8,32", *arguments]) == 2
    assert f'{module}, not installed here: pip install "bnfast[demo]"' in capsys.readouterr().err


def test_names_of_families_and_all():
    parse = names.name_list(OTHERS, families=True)
    assert parse("torch") == ["torch-contiguous", "torch-channels_last"]
    assert parse("jax,tensorflow") == ["tensorflow", "jax"]
    assert parse("all") == OTHERS


def test_the_table_of_shapes():
    shapes = cases.read_shapes()
    assert len(shapes) == len({(shape.set, shape.name) for shape in shapes}), "a name occurs twice in a set"
    assert set(bench.DEFAULT_SETS) <= {shape.set for shape in shapes}
    assert shapes[0] == cases.NamedShape("resnet50", "stem", 32, 64, (112, 112))
    assert shapes[0].size == 32 * 64 * 112 * 112
    made = cases.make_cases(shapes, ["channels_first"], ["train"], ["float32"])
    assert {case.layout for case in made if not case.shape.spatial} == {"channels_last"}


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.name != "copy"], ids=lambda peer: peer.name)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_peer_agrees(need, peer, dtype, layout):
    if peer.name != "bnfast":
        need("torch" if "torch" in peer.name else peer.distribution)
    if dtype == "bfloat16":
        need("ml_dtypes")
    threads = 1 if peer.name == "bnfast" or "torch" in peer.name else _tensorflow_threads()
    made = peer(threads)
    for shape in ("4,6,5x3", "16,5"):
        for op in cases.OPS:
            case = make_case(op, layout, dtype, shape)
            arrays = cases.make_arrays(case)
            before = arrays.x.copy()
            try:
                calls = made.prepare(case, arrays)
            except Unsupported:
                assert "16" in shape or (peer.name, dtype) == ("tensorflow", "float64")
                continue
            assert correctness.error_over_tolerance(case, arrays, calls.read(calls.fresh())) <= 1
            if calls.reused is not None:
                calls.reused()
            assert (arrays.x == before).all()


def _tensorflow_threads() -> int:
    """The threads TensorFlow already has, since an earlier test may have started it; 0 is TensorFlow's own choice."""
    import tensorflow as tf

    return tf.config.threading.get_intra_op_parallelism_threads()


@pytest.mark.parametrize("op", cases.OPS)
def test_a_wrong_result_is_noticed(op):
    case = make_case(op)
    arrays = cases.make_arrays(case)
    names = {"dx", "dgamma", "dbeta"} if op == "grad" else {"y"}
    channels = [correctness.expected_channel(case, arrays, c) for c in range(case.shape.c)]
    assert set(channels[0]) == names
    result = {name: np.stack([channel[name] for channel in channels], axis=-1) for name in names}
    assert correctness.error_over_tolerance(case, arrays, result) < 1e-3
    for name in names:
        wrong = {**result, name: result[name] * 1.01 + 0.01}
        assert correctness.error_over_tolerance(case, arrays, wrong) > 1
        wrong = {**result, name: np.full_like(result[name], np.nan)}
        assert correctness.error_over_tolerance(case, arrays, wrong) == math.inf
        if name in ("y", "dx"):
            wrong = {**result, name: result[name][:1]}
            assert correctness.error_over_tolerance(case, arrays, wrong) == math.inf, "another shape"


class Broken(PEERS[1]):
    """bnfast with wrong results, or one that raises."""

    name = "tensorflow"
    fault = "wrong"

    def prepare(self, case, arrays):
        calls = super().prepare(case, arrays)
        if self.fault == "unsupported":
            raise Unsupported("not this one")
        if self.fault == "raises":
            raise RuntimeError("two\nlines")
        calls.read = lambda result: {"y": result.y + 1}
        return calls


def test_a_peer_that_is_wrong_or_fails_is_left_out_with_the_reason(short):
    case = make_case()
    arrays = cases.make_arrays(case)
    ours, broken = PEERS[1](1), Broken(1)
    result = timing.measure(case, arrays, [PEERS[0](2), ours, broken], timing.MODES, rounds=2)
    assert {(found.peer, found.mode) for found in result.measurements} == {
        ("copy", "reused"),
        ("bnfast", "fresh"),
        ("bnfast", "held"),
        ("bnfast", "reused"),
    }
    assert result.left_out["tensorflow"].startswith("wrong result: ")
    assert all(len(found.seconds) == 2 and not found.kept for found in result.measurements)
    broken.fault = "raises"
    assert timing.prepare(case, arrays, [broken], {"fresh"}) == ([], {"tensorflow": "RuntimeError: two lines"})
    broken.fault = "unsupported"
    assert timing.prepare(case, arrays, [broken], {"fresh"}) == ([], {"tensorflow": "not this one"})
    broken.fault, broken.name = "wrong", "bnfast"  # type: ignore[misc]
    with pytest.raises(RuntimeError, match="bnfast is wrong"):
        timing.prepare(case, arrays, [broken], {"fresh"})
    broken.fault = "raises"
    with pytest.raises(RuntimeError, match=r"^two\nlines$"):
        timing.prepare(case, arrays, [broken], {"fresh"})


@pytest.mark.needs("rich")
def test_a_wrong_result_is_printed_and_what_a_peer_cannot_do_is_not(short, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PEERS", (*PEERS[:2], Broken))
    command = ["bench", "--quick", "--shape", "8,32", "--op", "train", "--outputs", "fresh", "--peers", "tensorflow"]
    for fault, lines in (("wrong", 1), ("unsupported", 0)):
        monkeypatch.setattr(Broken, "fault", fault)
        assert main(command) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if "8x32" in line]
        assert len(told) == lines
        assert all(
            f"{bench.TITLES['tensorflow']}, train given 8x32 channels_last float32: wrong result: " in t for t in told
        )


@pytest.mark.needs("rich")
def test_threads_that_a_library_cannot_change_any_more(need, capfd):
    need("tensorflow").constant(0)
    threads = str(_tensorflow_threads() + 1)
    assert main(["bench", "--quick", "--set", "tiny", "--threads", threads, "--peers", "tensorflow"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    title = bench.TITLES["tensorflow"]
    assert err.splitlines()[-1].startswith(f"bnfast: argument --threads: {title} can't change to {threads} threads: ")


@pytest.mark.needs("rich")
def test_bfloat16_needs_its_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert main(["bench", "--quick", "--shape", "8,32", "--dtype", "bfloat16"]) == 2
    assert capsys.readouterr().err == 'bnfast: this needs ml_dtypes, not installed here: pip install "bnfast[test]"\n'


def test_keras_on_another_backend_is_no_peer(need, monkeypatch):
    need("tensorflow")
    keras = need("keras")
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    (peer,) = [peer for peer in PEERS if peer.name == "keras-eager"]
    with pytest.raises(ImportError, match=r"^Keras runs on torch$"):
        peer(_tensorflow_threads())


@pytest.mark.parametrize("before", ["5", None])
def test_jax_s_threads_are_set_for_a_moment(need, monkeypatch, before):
    need("jax")
    monkeypatch.setenv("NPROC", "5")
    if before is None:
        monkeypatch.delenv("NPROC")
    for threads in (2, None):
        jax_peer.start(threads)
        assert os.environ.get("NPROC") == before


def test_without_a_given_number_the_time_decides_how_many_rounds(short, monkeypatch):
    case = make_case()
    arrays = cases.make_arrays(case)
    rounds = {}
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(timing, "ROUNDS_SECONDS", seconds)
        result = timing.measure(case, arrays, [PEERS[0](1)], ["fresh"], None)
        rounds[seconds] = len(result.measurements[0].seconds)
    assert rounds == {0.0: timing.MIN_ROUNDS, 1e9: timing.MAX_ROUNDS}


@pytest.mark.parametrize(
    ("mode", "cached", "calls"),
    [("fresh", True, 3), ("fresh", False, 2), ("held", True, 3), ("held", False, 5), ("warm", False, 3)],
)
def test_the_calls_of_a_piece(mode, cached, calls):
    """Two are timed, after those that fill the caches or what `held` keeps alive. A large tensor is kept no longer."""
    numbers = iter(range(10))
    measurement = timing.Measurement("peer", mode, lambda: next(numbers), calls=2)
    measurement.time_piece(cached)
    assert next(numbers) == calls
    assert list(measurement.kept) == ([0, 1, 2] if (mode, cached) == ("held", True) else [])


def test_every_round_has_all_measurements_in_another_order():
    measurements = [timing.Measurement(str(k), "fresh", int) for k in range(7)]
    orders = [[found.peer for found in timing.order(measurements, turn)] for turn in range(6)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert len({order[0] for order in orders}) > 3
    assert timing.order([], 3) == []


def test_warm_malloc_can_be_undone():
    with allocator.warm():
        kept = np.ones(1 << 20)
    assert kept.sum() == 1 << 20
    allocator.restore_defaults()


@pytest.mark.parametrize("error", [OSError, TypeError, None])
def test_malloc_of_another_library_stays_as_it_is(monkeypatch, error):
    def load(name):
        if error is not None:
            raise error
        return object()  # without mallopt

    monkeypatch.setattr("ctypes.CDLL", load)
    monkeypatch.setattr(allocator, "_LIBC", allocator._load_glibc())
    assert not allocator.available()
    allocator.restore_defaults()
    with allocator.warm():
        kept = np.ones(1 << 20)
    assert kept.sum() == 1 << 20


def test_where_no_system_reports_threads_a_piece_waits_10_ms(monkeypatch, tmp_path):
    slept = []
    monkeypatch.setattr(timing, "TASKS", tmp_path / "absent")
    monkeypatch.setattr("time.sleep", slept.append)
    timing.wait_for_idle_threads()
    assert slept == [0.01]


@pytest.mark.skipif(not timing.TASKS.exists(), reason="only Linux reports the states of threads")
def test_a_piece_waits_for_other_threads():
    """Such as the spinning workers of the previous peer; here a thread that computes for a second or two."""
    done = []
    thread = threading.Thread(target=lambda: done.append(hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)))
    thread.start()
    timing.wait_for_idle_threads(longest=100)
    time.sleep(0.2)  # the thread still needs the GIL for `append`
    assert done
    thread.join()


def make_row(peer: str, seconds: float, ratio: float | None, **changes) -> dict:
    about = {"shape": "a", "set": "s", "layout": "channels_last", "op": "train", "dtype": "float32", "bytes": 4000}
    return {**about, "peer": peer, "mode": "fresh", "seconds": seconds, "ratio": ratio, "to_copy": 2.0, **changes}


def test_summaries_take_the_faster_memory_format_of_each_case():
    rows = [
        make_row("bnfast", 1.0, 1.0),
        make_row("torch-contiguous", 4.0, 4.0),
        make_row("torch-channels_last", 2.0, 2.0),
        make_row("torch-contiguous", 8.0, 8.0, shape="b"),
        make_row("torch-channels_last", 9.0, 9.0, shape="b"),
    ]
    found = {summary.peer: summary for summary in report.summarize(rows)}
    assert set(found) == {"torch", "torch-contiguous", "torch-channels_last"}
    assert found["torch"].geomean == pytest.approx(4)
    assert (found["torch"].smallest, found["torch"].largest) == (2.0, 8.0)
    assert found["torch"].smallest_at == "a channels_last"


def test_a_report_has_the_operations_that_were_measured():
    rows = [make_row("bnfast", 1.0, 1.0), make_row("bnfast", 1.0, 1.0, op="grad", dtype="float64")]
    about = {"cpu": "c", "cores": 2, "l2_bytes": 0, "l3_bytes": 0, "isa": "i", "threads": 2, "load_before": 0}
    text = report.markdown({**about, "versions": {}}, rows, [], bench.TITLES)
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## train, float32, outputs dropped each call",
        "## grad, float64, outputs dropped each call",
    ]


def test_ratios_are_medians_within_rounds():
    measurements = [
        timing.Measurement("bnfast", "fresh", int, seconds=[1.0, 2.0, 10.0]),
        timing.Measurement("jax", "fresh", int, seconds=[3.0, 6.0, 10.0]),
        timing.Measurement("copy", "reused", int, seconds=[0.5, 1.0, 10.0]),
    ]
    rows = {row["peer"]: row for row in report.rows_of(timing.CaseResult(make_case("grad"), measurements, {}))}
    assert rows["jax"]["ratio"] == 3
    assert rows["jax"]["seconds"] == 6
    assert rows["copy"]["ratio"] is None
    assert rows["bnfast"]["to_copy"] == pytest.approx(2 / 1.5, rel=1e-3), "a gradient moves three tensors, a copy two"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00354, "0.00354"),
        (9.87, "9.87"),
        (98.8, "98.8"),
        (999.4, "999"),
        (999.7, "1000"),
        (98765, "98765"),
        (3e-6, "0.000003"),
    ],
)
def test_figures_have_no_exponent(value, text):
    assert report.digits(value) == text


def test_a_picture_of_one_peer_and_one_operation(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [make_row("bnfast", 1.0, 1.0, op="infer"), make_row("jax", 2.0, 2.0, op="infer")]
    figure.save(tmp_path / "one.png", rows, bench.TITLES, "a machine")
    assert (tmp_path / "one.png").stat().st_size > 20_000


@pytest.mark.needs("rich")
def test_a_busy_machine_is_refused_unless_rounds_are_given(monkeypatch, capsys):
    measured = []
    monkeypatch.setattr("bnfast.benchmark.machine.others_busy", lambda: 0.9)
    monkeypatch.setattr("bnfast.benchmark.machine.os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(bench, "_start_peers", lambda *_: ([], []))
    monkeypatch.setattr(bench, "_measure", lambda *_: measured.append(1) or ([], []))
    command = ["bench", "--shape", "4,6", "--op", "train", "--layout", "channels_last"]
    assert main(command) == 2
    assert "other programs keep 0.9 of 2 processors busy, so the figures would lie" in capsys.readouterr().err
    assert measured == []
    for look in (["--quick"], ["--rounds", "1"]):
        assert main([*command, *look]) == 0
        assert "; other programs kept 0.9 of 2 processors busy" in capsys.readouterr().out
    assert len(measured) == 2


def test_what_others_run_is_counted_and_ones_own_time_is_not(monkeypatch):
    ticks = iter([1000, 1000 + 3 * machine.os.sysconf("SC_CLK_TCK") // 4])
    monkeypatch.setattr(machine, "_busy_ticks", lambda: next(ticks))
    monkeypatch.setattr(machine.time, "sleep", lambda _: None)
    times = iter([5.0, 5.25])
    monkeypatch.setattr(machine.time, "process_time", lambda: next(times))
    assert others_busy(0.5) == 1.0
    monkeypatch.undo()
    for text in ("", "intr 1 2 3 4 5 6 7 8", "cpu 1 2 3 4"):
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
        assert others_busy(0.0) is None
    monkeypatch.undo()
    assert machine._field(Path("no such file"), "model name") == ""
    assert machine.load_sentence({"load_before": 1.5, "cores": 2}) == "Load before the run: 1.5"
