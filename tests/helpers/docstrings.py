"""The public callables of bnfast's namespaces, and the examples in their docstrings."""

from __future__ import annotations

import ast
import doctest
from pathlib import Path
from typing import Any

import bnfast

# The namespaces a user imports, and the package that each needs.
NAMESPACES = {
    "bnfast": None,
    "bnfast.keras": "tensorflow",
    "bnfast.torch": "torch",
    "bnfast.jax": "jax",
    "bnfast.jax.nnx": "flax",
    "bnfast.cuda": None,
    "bnfast.cuda.autograd": "torch",
    "bnfast.compat.v1": "tensorflow",
    "bnfast.distributed.mpi": "mpi4py",
}


def source(namespace: str) -> Path | None:
    """Its file; None if bnfast has no such module."""
    path = Path(bnfast.__file__).parent.joinpath(*namespace.split(".")[1:])
    return next((each for each in (path / "__init__.py", path.with_suffix(".py")) if each.is_file()), None)


def public(namespace: str) -> list[str]:
    """The names in `__all__`, read without an import, so that absent frameworks don't matter."""
    if namespace == "bnfast":
        return [name for name in bnfast.__all__ if name != "__version__"]
    path = source(namespace)
    if path is None:
        return []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no __all__")


def run_example(name: str, value: Any) -> None:
    """Runs the examples of a docstring, and fails where there is none or its output is another."""
    doc = value.__doc__ or ""
    assert "\n    Example:\n" in doc, f"{name} must have a section 'Example:' in its docstring"
    example = doctest.DocTestParser().get_doctest(doc, {}, name, None, None)
    assert example.examples, f"{name} must have lines that start with >>> in its example"
    assert not any(doctest.SKIP in each.options for each in example.examples), f"{name} must not skip its example"
    report: list[str] = []
    failed, _ = doctest.DocTestRunner().run(example, out=report.append)
    assert not failed, "".join(report)
