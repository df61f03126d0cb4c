"""The argument lists that must agree: functional, the stub, the validation, the binding, and the TensorFlow op.

The binding's lists (csrc/bind/arguments.h) make its C++ declarations, the signature that Python shows and the positions
that Callback fills. All other lists are compared with them: signatures, positional calls, and the lists that the
validation makes. A swapped, missing or additional argument in any of them fails a test.
"""

import ast
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bnfast import _core, functional
from bnfast._arguments import batch_norm as arguments
from bnfast._arguments import group_norm as group_arguments

STUB = ast.parse((Path(functional.__file__).parents[1] / "_core.pyi").read_text())
FUNCTIONS = {
    "train": (functional.batch_norm_train, arguments.train),
    "infer": (functional.batch_norm_infer, arguments.infer),
    "grad": (functional.batch_norm_grad, arguments.grad),
    "moments": (functional.moments, arguments.moments),
    "group_norm": (functional.group_norm, group_arguments.group_norm),
    "group_norm_grad": (functional.group_norm_grad, group_arguments.group_norm_grad),
    "layer_norm": (functional.layer_norm, group_arguments.layer_norm),
    "layer_norm_grad": (functional.layer_norm_grad, group_arguments.layer_norm_grad),
}

# The op has an argument in another form, or has no use for it.
OP_FORMS = {
    "negative_slope": "negative_slope_bits",  # TensorFlow's float attributes hold 32 bits
    "mean": "saved",  # one tensor (2, C)
    "invstd": "saved",
    "dmean": "statistics",  # a list of none or both
    "dvariance": "statistics",
    "residual of grad": "y",  # the op's gradient always reads y in place of the residual
}
NOT_IN_OP = {
    "BnfastTrain": {"out"},  # TensorFlow allocates outputs
    "BnfastInfer": {"out"},
    "BnfastGrad": {"out", "out_dresidual", "training"},  # a frozen gradient is made of TensorFlow's ops
}
ONLY_IN_OP = {
    "BnfastTrain": {"statistics_gradient"},
    "BnfastInfer": set(),
    # epsilon: for the second derivative. parameter_type: for a gradient without gamma and beta.
    "BnfastGrad": {"epsilon", "parameter_type"},
}
OP_PLUMBING = {"T", "U", "W"}  # dtypes; num_* count optional inputs


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


class Called(Exception):
    """Ends a call that a test only watches."""


def tensor(value: float) -> np.ndarray:
    return np.full((2, 3), value, np.float32)


def vector(value: float) -> np.ndarray:
    return np.full(3, value, np.float64)


# A valid value of each argument. The values differ, so that each tells which argument it is.
VALID: dict[str, Any] = {
    **{name: tensor(i) for i, name in enumerate(("x", "dy", "residual", "y", "out", "out_dresidual"), 1)},
    **{name: vector(i) for i, name in enumerate(("gamma", "beta", "moving_mean", "moving_variance", "mean"), 11)},
    **{name: vector(i) for i, name in enumerate(("invstd", "dmean", "dvariance"), 16)},
    **{"axis": 1, "momentum": 0.25, "epsilon": 0.5, "negative_slope": 0.75, "correction": 0, "training": True},
    **{"mask": np.ones((2, 1), np.float32), "activation": "relu", "nan_policy": "skip_update", "groups": 3},
}
EXCLUSIVE = ("residual", "y")  # of grad: at most one of the two


def same(left: Any, right: Any) -> bool:
    """Whether two arguments are the same value, but for the shape of an array."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return bool(left.size == right.size and (left.ravel() == right.ravel()).all())
    return type(left) is type(right) and bool(left == right)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_binding_has_the_order_of_functional(name):
    function, _ = FUNCTIONS[name]
    assert names(getattr(_core, name)) == names(function)


@pytest.mark.parametrize("name", ["batch_norm_train", "batch_norm_infer", "batch_norm_grad", "moments"])
def test_jax_has_the_arguments_of_functional(need, name):
    need("jax")
    import bnfast.jax

    ours, wanted = (inspect.signature(getattr(one, name)).parameters for one in (bnfast.jax, functional))
    # XLA allocates the results
    wanted = {key: one for key, one in wanted.items() if key not in ("out", "out_dresidual")}
    assert list(ours) == list(wanted)
    assert {one.default for one in ours.values()} == {one.default for one in wanted.values()}
    assert [one.kind for one in ours.values()] == [one.kind for one in wanted.values()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_validation_has_the_order_of_functional(name):
    function, validation = FUNCTIONS[name]
    assert names(validation) == names(function)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stub_has_the_order_of_the_binding(name):
    (stub,) = (node for node in STUB.body if isinstance(node, ast.FunctionDef) and node.name == name)
    assert [argument.arg for argument in stub.args.posonlyargs] == names(getattr(_core, name))


@pytest.mark.parametrize("direct", [True, False], ids=["to the binding", "to the validation"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional_passes_its_arguments_in_order(monkeypatch, name, direct):
    function, validation = FUNCTIONS[name]
    given = {argument: object() for argument in names(function)}
    if "mask" in given and direct:
        given["mask"] = None  # a mask always goes through the validation
    calls = []

    def watch(*values):
        calls.append(values)
        raise Called

    monkeypatch.setattr(_core, name, watch if direct else lambda *_: None)
    monkeypatch.setattr(inspect.getmodule(validation), validation.__name__, watch)
    with pytest.raises(Called):
        function(**given)
    assert calls == [tuple(given.values())]


@pytest.mark.parametrize("absent", EXCLUSIVE)
@pytest.mark.parametrize("name", ["train", "infer", "grad", "moments"])
def test_the_validation_returns_the_list_of_the_binding(name, absent):
    _, validation = FUNCTIONS[name]
    wanted = {argument: VALID[argument] for argument in names(getattr(_core, name))}
    if set(EXCLUSIVE) <= set(wanted):
        wanted[absent] = None
    received = dict(zip(wanted, validation(*wanted.values()), strict=True))
    assert {argument for argument in wanted if not same(received[argument], wanted[argument])} == set()


@pytest.mark.parametrize("name", ["group_norm", "group_norm_grad"])
def test_the_group_norm_validation_calls_the_binding_with_its_list(monkeypatch, name):
    _, validation = FUNCTIONS[name]
    wanted = {argument: VALID[argument] for argument in names(getattr(_core, name))}
    wanted |= {"mean": np.full((2, 3), 15.0), "invstd": np.full((2, 3), 16.0)} if name == "group_norm_grad" else {}
    wanted = {argument: wanted[argument] for argument in names(getattr(_core, name))}
    received = {}

    def watch(*values):
        received.update(zip(wanted, values, strict=True))
        raise Called

    monkeypatch.setattr(_core, name, watch)
    with pytest.raises(Called):
        validation(*wanted.values())
    received["axis"], wanted["axis"] = None, None  # the validation passes x as (N, A, C, S), whose channel axis is 2
    assert {argument for argument in wanted if not same(received[argument], wanted[argument])} == set()


@pytest.mark.parametrize(("op", "name"), [("BnfastTrain", "train"), ("BnfastInfer", "infer"), ("BnfastGrad", "grad")])
def test_the_op_has_the_arguments_of_the_binding(need, op, name):
    need("tensorflow")
    from bnfast.tensorflow import op as bridge
    from tensorflow.python.framework import op_def_registry

    available, reason = bridge.status()
    if not available:
        pytest.skip(f"the TensorFlow op: {reason}")
    definition = op_def_registry.get(op)
    inputs = [one.name for one in definition.input_arg]
    attributes = {one.name for one in definition.attr} - OP_PLUMBING
    attributes = {one for one in attributes if not one.startswith("num_")}
    wanted = [one for one in names(getattr(_core, name)) if one not in NOT_IN_OP[op]]
    wanted = ["residual of grad" if (one, name) == ("residual", "grad") else one for one in wanted]
    forms = {OP_FORMS.get(one, one) for one in wanted}
    assert {*inputs, *attributes} == forms | ONLY_IN_OP[op]
    # Three required tensors come first, then the scalars, then the optional tensors; each part has the binding's order.
    given = list(dict.fromkeys([*(OP_FORMS.get(one, one) for one in wanted), "epsilon"]))
    optional = next(i for i, one in enumerate(definition.input_arg) if one.number_attr)
    for part in (inputs[:3], inputs[3:optional], inputs[optional:]):
        assert part == [one for one in given if one in part]
