"""The command where its output can't be written, where it is interrupted, and where no machine could do what is asked.

Always one line on stderr and status 2 (130 after Ctrl-C), no traceback, and every file whole or not there.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bnfast.benchmark import model_memory, models, quiet
from bnfast.cli import bench, demo, files, main, output
from bnfast.cli.errors import REPORTED, UserError, require_memory

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")


def shell(redirection: str, *arguments: object, cwd: Path | None = None, **environment: str):
    """Run the command with `redirection` in the words of a shell."""
    words = [sys.executable, "-m", "bnfast", *map(str, arguments)]
    command = ["sh", "-c", f'"$@" {redirection}', "sh", *words]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def is_one_line(done: subprocess.CompletedProcess[str], *parts: str, status: int = 2) -> None:
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("bnfast: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


# ---- stdout and stderr -----------------------------------------------------------------------------------------------


@needs_full
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"], ["--version"], ["run", "--help"]])
def test_a_full_stdout_is_one_line(arguments):
    is_one_line(shell("> /dev/full", *arguments), "can't write to standard output: No space left on device")


def test_a_closed_stdout_is_one_line():
    is_one_line(shell(">&-", "info"), "can't write to standard output: it is closed")


def test_a_pipe_that_nobody_reads_is_one_line():
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "bnfast", "info"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    is_one_line(done, "can't write to standard output: Broken pipe")


@needs_full
@pytest.mark.parametrize("redirection", ["2> /dev/full", "2>&-"])
@pytest.mark.parametrize(("arguments", "status"), [(["dance"], 2), ([], 2), (["--version"], 0)])
def test_a_stderr_that_cannot_be_written_does_not_change_the_status(redirection, arguments, status):
    done = shell(redirection, *arguments)
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_an_ascii_terminal_gets_escapes(environment, tmp_path):
    environment = {"PYTHONUTF8": "0", **environment}
    for arguments in (["info"], ["run", "\N{GREEK SMALL LETTER BETA}.py"], ["bench", "--set", "\N{SNOWMAN}"]):
        done = shell("", *arguments, **environment)
        assert done.returncode == (0 if arguments == ["info"] else 2)
        assert (done.stdout + done.stderr).isascii()
        assert "Traceback" not in done.stderr


def test_text_that_the_encoding_lacks_is_escaped(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        output.show("picture-\N{GREEK SMALL LETTER BETA}\udcff.png")
        monkeypatch.undo()
    assert (tmp_path / "out").read_bytes() == b"picture-\\u03b2\\udcff.png\n"


def test_the_order_of_what_is_written_holds(tmp_path):
    code = "from bnfast.cli import output; print('one'); output.show('two'); print('three')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "one\ntwo\nthree\n"


def test_a_stream_without_a_descriptor_is_written_too(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    output.show("text")
    assert stream.getvalue() == "text\n"
    stream.close()
    with pytest.raises(UserError, match="can't write to standard output: I/O operation on closed file"):
        output.show("text")
    monkeypatch.setattr(sys, "stderr", stream)
    output.say("nothing is raised")
    monkeypatch.setattr(sys, "stderr", None)
    output.say("nothing is raised")
    with quiet.quiet_stderr():
        pass


def test_a_pipe_that_is_full_is_waited_for():
    """A pipe that another process made non-blocking takes 64 KiB, and then reports that it can't take more now."""
    code = "import os; os.set_blocking(1, False); from bnfast.cli import output; output.show('x' * 300_000)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"x" * 300_000 + b"\n"
    assert process.returncode == 0


# ---- requests that nothing could meet --------------------------------------------------------------------------------


@pytest.mark.needs("tensorflow", "keras", "matplotlib", "rich", "sklearn")
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["dance"], "invalid choice: 'dance'"),
        (["bench", "--threads", "1000000000"], "--threads: must be an integer <= 4096. Received: 1000000000"),
        (["bench", "--threads", "9" * 5000], "--threads: must be an integer >= 1. Received: 999"),
        (["bench", "--model", "A", "--threads", "4097"], "--threads: must be an integer <= 4096. Received: 4097"),
        (["bench", "--rounds", str(2**31)], "--rounds: must be an integer <= 2147483647. Received: 2147483648"),
        (
            ["bench", "--shape", "2000000000,2000000"],
            "2000000000x2000000 float32 needs at least 44,703,484 GiB of memory",
        ),
        (["bench", "--shape", f"{10**4000},3"], "--shape: must have at most 1152921504606846976 values"),
        (["bench", "--shape", "1,2," + "x".join("1" * 17)], "and 16 spatial extents"),
        (["bench", "--model", "A", "--size", "2147483647"], "A 16x2147483647x2147483647 float32 needs at least "),
        (["demo", "--epochs", str(10**30)], "--epochs: must be an integer <= 2147483647"),
    ],
)
def test_what_no_machine_can_do_is_one_line(capsys, arguments, part):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err
    assert err.startswith("bnfast: ")
    assert err.count("\n") == 1


def test_memory_is_compared_exactly(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 4096}.__getitem__)
    require_memory("this", 4 << 30)
    with pytest.raises(UserError, match=r"this needs at least 5 GiB of memory\. This machine has 4 GiB"):
        require_memory("this", (4 << 30) + 1)
    with pytest.raises(UserError, match="at least 9,313,"):
        require_memory("this", 10**400)
    monkeypatch.delattr(os, "sysconf")
    require_memory("this", 10**400)


@pytest.mark.parametrize(
    ("error", "line"),
    [(MemoryError("17 GiB"), "out of memory: 17 GiB"), (OSError(28, "No space left on device", "/x"), "No space left")],
)
def test_the_system_s_errors_are_one_line(capsys, monkeypatch, error, line):
    def fail():
        raise error

    monkeypatch.setattr("bnfast.cli.info.gather", fail)
    assert main(["info"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert line in err


def test_a_wrong_bridge_in_the_environment_is_one_line(need, tmp_path):
    need("tensorflow")
    need("sklearn")
    done = shell("", "demo", "--out", tmp_path, BNFAST_BRIDGE="stone")
    is_one_line(done, "BNFAST_BRIDGE must be one of", "'stone'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "x.py"],
        ["run", "-m", "x"],
        ["run", "--compare", "-m", "x"],
        ["bench", "--shape", "8,8", "--out", "x"],
    ],
)
def test_a_deleted_working_directory_is_one_line(need, tmp_path, arguments):
    need("tensorflow")
    folder = tmp_path / "gone"
    folder.mkdir()
    words = [sys.executable, "-m", "bnfast", *arguments]
    done = subprocess.run(
        ["sh", "-c", f'rmdir "{folder}"; "$@"', "sh", *words], cwd=folder, capture_output=True, text=True, timeout=60
    )
    is_one_line(done)


def test_where_no_process_can_be_started(monkeypatch, capsys, need, tmp_path):
    need("tensorflow")

    def refuse(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.delenv("BNFAST_BRIDGE", raising=False)
    monkeypatch.setattr(subprocess, "run", refuse)
    assert main(["info"]) == 0
    assert "numpy_function (no process could be started to test _tf.so: Resource temp" in capsys.readouterr().out
    (tmp_path / "x.py").touch()
    assert main(["run", "--compare", "--quiet", "--in-place", str(tmp_path / "x.py")]) == 2
    assert capsys.readouterr().err == "bnfast: run --compare: [Errno 11] Resource temporarily unavailable\n"
    reason = model_memory._run_child(models.Spec("A"), "keras", None)
    assert reason == "no process could be started: Resource temporarily unavailable"
    monkeypatch.setattr(sys, "executable", "")
    assert model_memory._run_child(models.Spec("A"), "keras", None).endswith(
        "the path of the Python interpreter is unknown"
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def full_disk(monkeypatch, after: int = 0) -> None:
    """Make os.fsync fail as on a full disk, from the call number `after` on."""
    calls = iter(range(100))

    def fsync(descriptor: int) -> None:
        if next(calls) >= after:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_full_disk_leaves_every_file_as_it_was(monkeypatch, tmp_path, after):
    old, new, third = (tmp_path / name for name in ("old.json", "new.md", "new.png"))
    old.write_bytes(b"old")
    full_disk(monkeypatch, after)
    with pytest.raises(UserError, match=r"can't write .*: No space left on device"):
        files.save({old: b"1", new: b"2", third: b"3"})
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"old"


def test_an_interrupt_leaves_every_file_as_it_was(monkeypatch, tmp_path):
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.save({tmp_path / "new": b"1"})
    assert list(tmp_path.iterdir()) == []


def test_files_are_written_through_links_and_with_the_usual_permissions(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "plain").write_bytes(b"")
    files.save({tmp_path / "link": b"new", tmp_path / "fresh": b"1"})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"
    assert (tmp_path / "fresh").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_long_name_and_a_name_that_is_taken(tmp_path):
    path = tmp_path / ("x" * 250 + ".png")
    files.prepare("--out", [path])
    files.save({path: b"1"})
    assert [*tmp_path.iterdir()] == [path]
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"argument --out: can't write to .*folder\.png: it is not a file"):
        files.prepare("--out", [tmp_path / "folder.png"])


@pytest.mark.needs("tensorflow", "keras", "matplotlib", "rich", "sklearn")
@pytest.mark.serial
def test_bench_on_a_full_disk_or_stdout(capsys, monkeypatch, tmp_path):
    for module in ("torch", "tensorflow", "keras", "jax"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("bnfast.benchmark.timing.wait_for_idle_threads", lambda: None)
    arguments = ["bench", "--quick", "--shape", "8,32", "--op", "infer", "--out", str(tmp_path / "new")]
    with monkeypatch.context() as patched:
        full_disk(patched)
        assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("bnfast: can't write ")
    assert list((tmp_path / "new").iterdir()) == []

    def no_room(about):
        raise UserError("can't write to standard output: No space left on device")

    monkeypatch.setattr(bench, "_print_summary", lambda *_: no_room(_))
    assert main(arguments) == 2
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"bench.json", "bench.md", "bench.png"}, "not lost"


def test_preparing_leaves_nothing(tmp_path):
    files.prepare("--out", [tmp_path / "new" / "bench.json"])
    assert list((tmp_path / "new").iterdir()) == []
    assert demo._picture_path(tmp_path / "x.png") == tmp_path / "x.png"
    assert not (tmp_path / "x.png").exists()


def test_starting_tensorflow_without_files_in_memory(monkeypatch, capfd):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with quiet.quiet_stderr():
        os.write(2, b"noise")
    assert capfd.readouterr().err == ""
    with contextlib.suppress(RuntimeError), quiet.quiet_stderr():
        os.write(2, b"a reason")
        raise RuntimeError
    assert capfd.readouterr().err == "a reason"


def test_keras_backend_is_chosen_before_it_is_imported(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    monkeypatch.setitem(sys.modules, "keras", None)
    quiet.prepare_tensorflow()
    assert os.environ["KERAS_BACKEND"] == "torch"
    monkeypatch.delitem(sys.modules, "keras")
    quiet.prepare_tensorflow()
    assert os.environ["KERAS_BACKEND"] == "tensorflow"
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0", "the user's choice"


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no files in memory")
@pytest.mark.parametrize(
    ("error", "shown"), [(RuntimeError, "a reason"), (KeyboardInterrupt, ""), (UserError, ""), (MemoryError, "")]
)
def test_starting_tensorflow_needs_no_disk(monkeypatch, capfd, error, shown):
    """And what it logs before an interrupt, or before an error that is reported as one line, is no reason."""
    monkeypatch.setattr("tempfile.TemporaryFile", None)

    def log_and_fail() -> None:
        with quiet.quiet_stderr(REPORTED):
            os.write(2, b"a reason")
            raise error("")

    with pytest.raises(error):
        log_and_fail()
    assert capfd.readouterr().err == shown


def test_a_closed_descriptor_is_no_file_s():
    """Else the file of --out becomes standard error, and TensorFlow logs into it."""
    code = "from bnfast.cli import output; import os; output.occupy_closed_descriptors(); "
    code += "print(os.open(os.devnull, os.O_RDONLY) > 2)"
    command = ["sh", "-c", '"$@" 2>&- <&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == "True\n"


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.needs("tensorflow", "keras", "matplotlib", "rich", "sklearn")
@pytest.mark.serial
def test_an_interrupt_is_one_line_and_status_130(tmp_path):
    code = """
import os, signal, sys, threading
from bnfast.benchmark import timing
from bnfast.cli import main
for name in ("torch", "tensorflow", "keras", "jax"):
    sys.modules[name] = None
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with SIGINT ignored
running, wait = threading.Event(), timing.wait_for_idle_threads
timing.wait_for_idle_threads = lambda: (running.set(), wait())  # called before every measurement
threading.Thread(target=lambda: (running.wait(), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
sys.exit(main(["bench", "--rounds", "1000000", "--shape", "8,8", "--out", sys.argv[1]]))
"""
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "bnfast: interrupted\n"
    assert list(tmp_path.iterdir()) == []
