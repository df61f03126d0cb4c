"""The compiled modules of the bnfast that is imported: what they export and need, and how they are hardened."""

import re
import sys
from pathlib import Path

import bnfast
import pytest
from elf import Library

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")

EXPORTS = {
    "_core": {"PyInit__core", "bnfast_get_num_threads", "bnfast_set_num_threads"},  # the two are for threadpoolctl
    "_cuda": {"PyInit__cuda"},
    "_tf": {"bnfast_connect"},
}
# Of these a distribution has its own; libstdc++ is linked into a wheel, and shared where a distribution builds bnfast.
SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libdl.so.2", "libpthread.so.0"}
LOADERS = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def path_of(name: str) -> Path:
    (path,) = Path(bnfast.__file__).parent.glob(f"{name}.*so")
    return path


@pytest.fixture(params=EXPORTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def module(name: str) -> Library:
    return Library(path_of(name))


def test_it_exports_its_entry_alone(name: str, module: Library) -> None:
    assert module.exports == EXPORTS[name]


def test_it_needs_the_system_alone(module: Library) -> None:
    openmp = {"libgomp.so.1"} if bnfast.build_info()["threading"] != "own threads" else set()
    assert module.needed <= SYSTEM | LOADERS | openmp
    assert module.run_paths == set()


def test_it_is_hardened(name: str, module: Library) -> None:
    assert module.has_relro
    assert module.binds_now
    assert not module.has_executable_stack
    assert "__stack_chk_fail" in module.imports
    if name != "_tf":  # it copies nothing of a size known at run time alone
        assert any(re.fullmatch(r"__\w+_chk", symbol) for symbol in module.imports), sorted(module.imports)


def test_it_says_nothing_of_the_machine_that_built_it(name: str) -> None:
    folders = rb"/(?:home|root|Users|tmp|work|build|project|builds)/[\w.+-]+"
    assert re.findall(folders, path_of(name).read_bytes()) == []
