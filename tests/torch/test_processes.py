"""Imports, threads, fork and worker processes beside PyTorch."""

import glob
import os
import subprocess
import sys

import pytest

STEP = """
x = torch.randn(16, 64, 32, 32, requires_grad=True)
module = bnfast.torch.BatchNorm2d(64)
y = module(x); y.sum().backward()
assert torch.allclose(y, torch.nn.functional.batch_norm(x, None, None, training=True), atol=1e-4)
"""


def run(code, *arguments, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize(
    "first", ["import torch", "import bnfast", "import bnfast.torch", "import numpy, torch, bnfast"]
)
def test_import_orders(first):
    run(f"{first}\nimport bnfast, torch, bnfast.torch\n{STEP}")


def test_a_torch_without_dlpacks_table_is_read_through_capsules():
    code = f"""
import torch, numpy as np
if hasattr(torch.Tensor, '__dlpack_c_exchange_api__'): del torch.Tensor.__dlpack_c_exchange_api__  # before 2.10
import bnfast.torch
from bnfast.torch import kernels
{STEP}
bits = bnfast.batch_norm_train(x.detach().numpy(), axis=1, epsilon=1e-5).y
assert y.detach().numpy().tobytes() == bits.tobytes()
last = x.detach().contiguous(memory_format=torch.channels_last)
assert module(last).is_contiguous(memory_format=torch.channels_last)
kernels.train(last, None, None, None, (None, None), kernels.Options())  # declines nothing
"""
    run(code)


def test_importing_bnfast_loads_no_torch():
    assert run("import sys, bnfast; print('torch' in sys.modules)") == "False\n"


def test_a_missing_torch_is_one_clear_line():
    code = "import sys; sys.modules['torch'] = None\ntry: import bnfast.torch\nexcept ImportError as e: print(e)"
    assert run(code) == 'bnfast.torch needs PyTorch, which is not installed: pip install "bnfast[torch]"\n'


def test_a_torch_that_misses_a_package_says_so_itself(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import bnfast_no_such_package")
    code = "import sys; sys.path.insert(0, sys.argv[1])\ntry: import bnfast.torch\nexcept ImportError as e: print(e)"
    assert run(code, str(tmp_path)) == "No module named 'bnfast_no_such_package'\n"


@pytest.mark.serial
def test_calls_run_on_pytorchs_threads_with_the_same_bits():
    """Also where PyTorch has fewer threads than bnfast, and in a forked child, which has none of them."""
    code = """
import os, time, torch, bnfast, bnfast.torch
def workers(wanted):  # a thread has its name once it has run
    until = time.monotonic() + 10
    while True:
        names = [open(f"/proc/self/task/{i}/comm").read().strip() for i in os.listdir("/proc/self/task")]
        if names.count("bnfast") == wanted or time.monotonic() > until:
            return names.count("bnfast")
def bits():  # without an operation of PyTorch's own, which would wait for its threads in the child
    with torch.no_grad():
        return bnfast.torch.BatchNorm2d(64)(x).numpy().tobytes()
torch.manual_seed(0)
x = torch.randn(16, 64, 32, 32)
torch.set_num_threads(3)
bnfast.set_num_threads(3)
borrowed = bits()
assert workers(0) == 0, "no thread of our own is needed"
child = os.fork()
if child == 0:
    os._exit(0 if bits() == borrowed and workers(2) == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
torch.set_num_threads(2)
assert bits() == borrowed and workers(2) == 2
assert not bnfast._core._torch_borrow_threads(False)
assert bits() == borrowed
"""
    run(code)


@pytest.mark.serial
def test_a_thread_that_has_run_nothing_of_pytorchs_heeds_its_number_of_threads():
    code = """
import os, threading, torch, bnfast.torch
torch.set_num_threads(1)
x = torch.randn(8, 32, 40, 40)
def threads(): return len(os.listdir("/proc/self/task"))
before, all_run, all_done = threads(), threading.Barrier(5), threading.Barrier(5)
def serve():
    bnfast.torch.batch_norm(x, None, None, training=True)
    all_run.wait(), all_done.wait()
servers = [threading.Thread(target=serve) for _ in range(4)]
for server in servers: server.start()
all_run.wait()
most = before + 4 + bnfast.get_num_threads() - 1  # one team of our own
assert threads() <= most, (before, threads(), most)
all_done.wait()
"""
    run(code, OMP_NUM_THREADS="16")


BORROWS = "import torch, bnfast, bnfast.torch\nprint(bnfast._core._torch_borrow_threads(True))"


def test_no_threads_are_borrowed_where_another_openmp_library_is_in_front():
    from sklearn import __path__ as folders  # its wheel brings a libgomp of its own

    others = glob.glob(os.path.join(os.path.dirname(folders[0]), "scikit_learn.libs", "libgomp*"))
    if not others:
        pytest.skip("scikit-learn has no libgomp of its own here")
    assert run(BORROWS) == "True\n"
    assert run(BORROWS, LD_PRELOAD=others[0]) == "False\n"


@pytest.mark.parametrize(
    ("size", "borrows"),
    [("16k", False), ("200000 B", False), ("64", False), ("16M", True), ("1 g", True), ("300", True), ("?", True)],
)
def test_threads_with_too_little_stack_are_not_borrowed(size, borrows):
    assert run(BORROWS, OMP_STACKSIZE=size) == f"{borrows}\n"


@pytest.mark.serial
def test_threads_stay_bounded():
    code = f"""
import os, torch, bnfast, bnfast.torch, threading
before = len(os.listdir("/proc/self/task"))
def work():
{"".join("    " + line + chr(10) for line in STEP.strip().splitlines())}
work()
own = len(os.listdir("/proc/self/task"))
for _ in range(20): work()
assert len(os.listdir("/proc/self/task")) <= own, "no call adds threads"
workers = [threading.Thread(target=work) for _ in range(8)]
for w in workers: w.start()
for w in workers: w.join()
"""
    run(code)


@pytest.mark.serial
def test_fork():
    code = f"""
import os, torch, bnfast.torch
{STEP}
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    exec({STEP!r})
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    run(code)


WORKERS = """
import sys, torch, bnfast.torch
class Data(torch.utils.data.Dataset):
    module = bnfast.torch.BatchNorm2d(8).eval()
    def __len__(self): return 8
    def __getitem__(self, i):
        with torch.no_grad():
            return self.module(torch.full((1, 8, 64, 64), float(i)))[0, 0, 0, 0]
if __name__ == "__main__":
    Data()[0]
    loader = torch.utils.data.DataLoader(Data(), 2, num_workers=2, multiprocessing_context=sys.argv[1], timeout=120)
    print(torch.cat([*loader]).round().tolist())
"""


@pytest.mark.serial
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(tmp_path, method):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    result = subprocess.run([sys.executable, script, method], capture_output=True, text=True, timeout=300)
    assert result.stdout == "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]\n", result.stderr[-2000:]
