"""bnfast in a root of its own with this Python, NumPy, the libraries that they and bnfast name, and nothing else: no
compiler, no libgomp, no shell, no /sys."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import bnfast
import numpy
import pytest
from needs import absent

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(sys.platform != "linux", reason="changes the root as Linux does"),
    pytest.mark.skipif(bnfast.build_info()["threading"] != "own threads", reason="built with OpenMP"),
]

TOOLS = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}  # whatever PATH the tests have
PROGRAM = """
import os
import numpy as np
import bnfast

assert not os.path.exists("/bin") and not os.path.exists("/sys")
bnfast.set_num_threads(2)
rng = np.random.default_rng(0)
x, dy = rng.normal(3, 2, (2, 4096, 64)).astype("float32")
y, mean, variance, invstd = bnfast.batch_norm_train(x)
wanted = (x - x.mean(0, dtype=float)) / np.sqrt(x.var(0, dtype=float) + 1e-3)
np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
dx, dgamma, dbeta, _ = bnfast.batch_norm_grad(dy, x, mean, invstd)
np.testing.assert_allclose(dbeta, dy.sum(0, dtype=float), rtol=1e-4, atol=1e-3)
np.testing.assert_allclose(dgamma, (dy * wanted).sum(0, dtype=float), rtol=1e-4, atol=1e-3)
with open("/proc/self/maps") as maps:
    assert "gomp" not in maps.read().replace("scipy_openblas", "")
print("computed with", bnfast.build_info()["threading"])
"""


def packages() -> list[Path]:
    """The folders of NumPy, with what its wheel bundles, and of bnfast."""
    ours, theirs = (Path(str(module.__file__)).parent for module in (bnfast, numpy))
    return [one for one in (ours, theirs, theirs.with_name("numpy.libs")) if one.exists()]


def libraries(files: list[Path]) -> set[Path]:
    """The shared libraries that these files need, as the loader finds them."""
    told = subprocess.run(["/usr/bin/env", "ldd", *files], capture_output=True, text=True, env=TOOLS).stdout
    return {Path(word) for word in told.split() if word.startswith("/") and not word.endswith(":")}


def test_it_computes_in_a_bare_root(tmp_path: Path) -> None:
    for tool in ("unshare", "ldd", "mount", "chroot"):
        if shutil.which(tool, path=TOOLS["PATH"]) is None:
            absent("unshare", f"{tool} is not there")
    unshare = ["/usr/bin/env", "unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    if subprocess.run([*unshare, "true"], capture_output=True, env=TOOLS).returncode:
        absent("unshare", "no namespace may be made here")
    python = Path(os.path.realpath(sys.executable))
    standard = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    modules = [path for folder in (*packages(), standard[1] / "lib-dynload") for path in folder.rglob("*.so*")]
    needed = libraries([python, *modules])
    assert needed
    assert [path for path in needed if path.name.startswith("libgomp")] == []
    (tmp_path / "program.py").write_text(PROGRAM)
    steps = ["set -e"]
    for source in dict.fromkeys([*standard, python, *packages(), *sorted(needed), Path("/proc"), Path("/dev/urandom")]):
        target = tmp_path / source.relative_to("/")
        if any(other in source.parents for other in (*standard, *packages())):
            continue
        place = target if source.is_dir() else target.parent
        steps += [f"mkdir -p {place}", f"[ -e {target} ] || touch {target}", f"mount --rbind {source} {target}"]
    path = ":".join(sorted({str(folder.parent) for folder in packages()}))
    steps.append(f"exec env -i PYTHONPATH={path} $(command -v chroot) {tmp_path} {python} -S -B /program.py")
    script = "\n".join(steps)
    done = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True, timeout=120, env=TOOLS)
    assert (done.stdout, done.stderr) == ("computed with own threads\n", "")
