"""Imports, threads, fork and several devices: each test is a process of its own."""

import importlib
import os
import runpy
import subprocess
import sys

import pytest

STEP = """
import numpy
rng = numpy.random.default_rng(0)
x = rng.standard_normal((16, 32, 32, 64)).astype("float32")
wanted = bnfast.batch_norm_train(x).y
step = jax.jit(jax.value_and_grad(lambda x: ((y := bnfast.jax.batch_norm_train(x).y) ** 2).sum(), has_aux=False))
assert numpy.isfinite(step(x)[1]).all()
assert (numpy.asarray(jax.jit(lambda x: bnfast.jax.batch_norm_train(x).y)(x)) == wanted).all()
"""


def run(code, **environment):
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **environment}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize(
    "first", ["import jax", "import bnfast.jax", "import bnfast, numpy; bnfast.batch_norm_train(numpy.ones((2, 2)))"]
)
def test_import_orders(first):
    run(f"{first}\nimport bnfast, bnfast.jax, jax\n{STEP}")


TORCH = "import torch; torch.randn(64, 64) @ torch.randn(64, 64)"
TENSORFLOW = "import tensorflow; tensorflow.ones((64, 64)) @ tensorflow.ones((64, 64))"


@pytest.mark.parametrize("other", [TORCH, TENSORFLOW], ids=["torch", "tensorflow"])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_beside_another_framework(need, other, when):
    need(other.split(";")[0].removeprefix("import "))
    parts = ["import bnfast, bnfast.jax, jax", STEP, STEP]
    parts.insert(["before", "between", "after"].index(when), other)
    run("\n".join(parts))


def test_importing_bnfast_loads_no_jax():
    assert run("import sys, bnfast; print('jax' in sys.modules)") == "False\n"


@pytest.mark.parametrize(("package", "module", "name"), [("jax", "jax", "JAX"), ("flax", "jax.nnx", "Flax")])
def test_a_missing_package_is_one_clear_line(package, module, name):
    code = (
        f"import sys; sys.modules['{package}'] = None\ntry: import bnfast.{module}\nexcept ImportError as e: print(e)"
    )
    assert run(code) == f'bnfast.{module} needs {name}, which is not installed: pip install "bnfast[{package}]"\n'


@pytest.mark.parametrize(("package", "module"), [("jax", "jax"), ("flax", "jax.nnx")])
def test_what_a_package_lacks_is_told_in_its_own_words(need, package, module, tmp_path, monkeypatch):
    need(package)
    path = importlib.import_module(f"bnfast.{module}").__file__
    (tmp_path / f"{package}.py").write_text("import absent_for_certain")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package)
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'absent_for_certain'$"):
        runpy.run_path(path)


@pytest.mark.serial
def test_calls_from_many_threads_have_the_same_bits_and_add_no_threads():
    code = f"""
import os, threading, time, bnfast, bnfast.jax, jax
{STEP}
step = jax.jit(lambda x: bnfast.jax.batch_norm_train(x, activation="relu").y)
wanted = bnfast.batch_norm_train(x, activation="relu").y
step(x)
threads = lambda: set(map(int, os.listdir("/proc/self/task")))
before = threads()
wrong = []
def work(i):
    for _ in range(10):
        y = numpy.asarray(step(x)) if i % 2 else bnfast.batch_norm_train(x, activation="relu").y
        if not (y == wanted).all(): wrong.append(i)
workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for w in workers: w.start()
for w in workers: w.join()
assert wrong == []
mine = {{w.native_id for w in workers}}
while mine & threads(): time.sleep(0.01)  # the kernel lists a thread a moment longer than join waits for it
more = threads() - before
assert not more, [open(f"/proc/self/task/{{i}}/comm").read().strip() for i in more]
"""
    run(code)


@pytest.mark.serial
def test_numpy_functions_work_in_a_forked_child():
    """JAX itself doesn't run after fork, as its warning says."""
    code = f"""
import os, warnings, bnfast, bnfast.jax, jax
{STEP}
warnings.simplefilter("ignore")
pid = os.fork()
if pid == 0:
    os._exit(0 if (bnfast.batch_norm_train(x).y == wanted).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert numpy.isfinite(step(x)[1]).all()
"""
    run(code)


def test_several_devices():
    """pmap and shard_map take the statistics of each device's part; a sharded array has those of all its parts."""
    code = """
import bnfast, bnfast.jax, jax, numpy
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
shard_map = getattr(jax, "shard_map", None)
if shard_map is None:
    import functools, jax.experimental.shard_map
    shard_map = functools.partial(jax.experimental.shard_map.shard_map, check_rep=False)
x = numpy.random.default_rng(0).standard_normal((8, 4, 6)).astype("float32")
gamma = jnp.arange(1.0, 7)
f = lambda x, gamma: bnfast.jax.batch_norm_train(x, gamma).y
whole = bnfast.batch_norm_train(x, numpy.asarray(gamma)).y
parts = numpy.concatenate([bnfast.batch_norm_train(half, numpy.asarray(gamma)).y for half in numpy.split(x, 2)])
mesh = Mesh(numpy.array(jax.devices()), ("d",))
sharded = jax.device_put(x, NamedSharding(mesh, P("d")))
for call in (jax.jit(f), f):
    numpy.testing.assert_array_equal(call(sharded, gamma), whole)
mapped = shard_map(f, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
numpy.testing.assert_array_equal(jax.jit(mapped)(x, gamma), parts)
numpy.testing.assert_array_equal(jax.pmap(f, in_axes=(0, None))(x.reshape(2, 4, 4, 6), gamma).reshape(x.shape), parts)
loss = lambda run: jax.jit(jax.grad(lambda x, gamma: (run(x, gamma) ** 3).sum(), (0, 1)))
apart = lambda x, gamma: jnp.concatenate([f(half, gamma) for half in jnp.split(x, 2)])
for ours, theirs in zip(loss(mapped)(x, gamma), loss(apart)(x, gamma)):
    numpy.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
"""
    run(code, XLA_FLAGS="--xla_force_host_platform_device_count=2")
