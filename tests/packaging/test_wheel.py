"""The wheel that BNFAST_WHEEL names, as auditwheel left it: tag, size, contents. `.ci/run wheel` builds it, and runs
the tests of this folder in an environment that has it installed and no compiler."""

import os
import platform
import re
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import bnfast
import pytest

WHEEL = Path(os.environ.get("BNFAST_WHEEL", ""))
MOST_BYTES = 4_000_000  # 3.87 MB when this was written, 3.15 of it _core: docs/decisions/0040-wheel.md

pytestmark = pytest.mark.skipif(not WHEEL.name, reason="BNFAST_WHEEL names no wheel")


@pytest.fixture(scope="module")
def names() -> list[str]:
    return zipfile.ZipFile(WHEEL).namelist()


def test_the_wheel_is_what_is_installed(names: list[str]) -> None:
    installed = Path(bnfast.__file__).parent
    assert "site-packages" in installed.parts
    with zipfile.ZipFile(WHEEL) as wheel:
        for name in names:
            if name.endswith(".so"):
                assert (installed.parent / name).read_bytes() == wheel.read(name), name


@pytest.mark.skipif("manylinux" not in WHEEL.name, reason="not a wheel for glibc")
def test_the_tag_is_that_of_glibc_2_34() -> None:
    """glibc alone decides, as libstdc++ is linked into the modules: pthread_create and dlopen moved into libc with
    2.34, strtol got another name with 2.38. Built with an older one it is that one, 2.28 in manylinux's image."""
    wanted = max(int(version) for version in re.findall(r"manylinux_2_(\d+)_", WHEEL.name))
    here = int(platform.libc_ver()[1].split(".")[1])
    assert wanted <= (min(here, 34) if here < 38 else here)


def test_the_size() -> None:
    assert WHEEL.stat().st_size <= MOST_BYTES


def test_the_contents(names: list[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"bnfast", f"bnfast-{bnfast.__version__}.dist-info"}
    files = [name.rpartition("/")[2] for name in names if name.startswith("bnfast/") and not name.endswith("/")]
    assert {name.rpartition(".")[2] for name in files} == {"py", "pyi", "so", "typed", "csv"}
    compiled = sorted(name.split(".")[0] for name in names if name.endswith(".so"))
    assert compiled == ["bnfast/_core", "bnfast/_cuda", "bnfast/_tf"], "nothing is bundled"
    licences = [name for name in names if name.endswith("/LICENSE")]
    assert len(licences) == 1


def test_the_metadata(names: list[str]) -> None:
    (name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    metadata = HeaderParser().parsestr(zipfile.ZipFile(WHEEL).read(name).decode())
    assert (metadata["Name"], metadata["Version"]) == ("bnfast", bnfast.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert [one for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in one] == ["numpy>=1.26"]
