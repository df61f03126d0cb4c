"""A pytest plugin: it samples the long products (sampling.py), skips files whose frameworks aren't installed, sets the
number of workers, and lets serial tests run alone (turns.py). pytest-xdist spreads a run of all tests over processes,
by file; a run of named files uses one."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import bnfast
import needs
import pytest
import sampling
import turns

MOST_WORKERS = 4  # a worker with TensorFlow and torch loaded takes 2 GB
LOCKS = pytest.StashKey[tempfile.TemporaryDirectory[str]]()
LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    whole = os.environ.get("BNFAST_WHOLE", "0") not in ("", "0")
    parser.addoption("--whole", action="store_true", default=whole, help="no samples: all cases (also BNFAST_WHOLE=1)")
    parser.addoption("--few", type=int, metavar="N", help="N cases of every parametrized test, and each value of each")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["BNFAST_SEED"] = sampling.seed()  # the workers of pytest-xdist take it from here
    config.stash[LEFT_OUT] = 0
    if not hasattr(config, "workerinput"):
        config.stash[LOCKS] = tempfile.TemporaryDirectory(prefix="bnfast-turns-")


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("whole"):
        return "cases: all"
    return f"cases: a sample of the long products, BNFAST_SEED={sampling.seed()} (--whole: all)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("whole") or any("::" in argument for argument in config.args):
        return  # a test that was named on the command line always runs
    items[:], out = sampling.split(items, sampling.seed(), config.getoption("few"))
    config.stash[LEFT_OUT] = len(out)
    config.hook.pytest_deselected(items=out)


# ---- frameworks that aren't installed --------------------------------------------------------------------------------


class ModuleOfTests(pytest.Module):
    """A file that imports an optional package at its top is skipped, by name, where that package is absent."""

    def _getobj(self) -> Any:
        try:
            return super()._getobj()
        except self.CollectError as error:
            cause: BaseException | None = error
            while cause is not None:
                name = (getattr(cause, "name", None) or "").split(".")[0]
                if isinstance(cause, ModuleNotFoundError) and name in needs.PACKAGES - needs.REQUIRED:
                    pytest.skip(f"{name} isn't installed", allow_module_level=True)
                cause = cause.__cause__ or cause.__context__
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> pytest.Module:
    return ModuleOfTests.from_parent(parent, path=module_path)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for package in marker.args:
            needs.need_module(package)


# ---- pytest-xdist ----------------------------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """The default number of threads, at most four; no workers for a run of named files."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None
    if config.args_source is pytest.Config.ArgsSource.ARGS or config.getoption("collectonly"):
        return 0
    workers = min(MOST_WORKERS, bnfast.build_info()["default_threads"])
    return workers if workers > 1 else 0


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["locks"] = node.config.stash[LOCKS].name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if not hasattr(item.config, "workerinput"):  # there is no other process
        return (yield)
    with turns.turn(Path(item.config.workerinput["locks"]), alone=item.get_closest_marker("serial") is not None):
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After a file, what is left counts as permanent: TensorFlow's graphs grow to gigabytes of objects, and each full
    collection, of which many tests ask for some, would walk them all."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})  # a crashed worker has none; all workers leave out the same cases
    node.config.stash[LEFT_OUT] = output.get("left_out", node.config.stash[LEFT_OUT])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if out := config.stash[LEFT_OUT]:
        terminalreporter.write_line(f"{out} cases left out by BNFAST_SEED={sampling.seed()}; --whole runs them")
