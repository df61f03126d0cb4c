"""The argument lists that must agree: functional, the stub, the validation, the binding, and the TensorFlow op.

The binding's lists (csrc/bind/arguments.h) make its C++ declarations, the signature that Python shows and the positions
that Callback fills. Every other list is compared with them here, so a swapped or missing argument fails a test.
"""

import ast
import inspect
from pathlib import Path
from typing import Any

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
    "momentum": "momentum_bits",  # TensorFlow's float attributes hold 32 bits
    "epsilon": "epsilon_bits",
    "negative_slope": "negative_slope_bits",
    "mean": "saved",  # one tensor (2, C)
    "invstd": "saved",
    "dmean": "statistics",  # a list of none or both
    "dvariance": "statistics",
    "residual of grad": "y",  # the op's gradient always reads y in place of the residual
}
NOT_IN_OP = {
    "BnfastTrain": {"out"},  # TensorFlow allocates outputs
    "BnfastGrad": {"out", "out_dresidual", "training"},  # a frozen gradient is made of TensorFlow's ops
}
ONLY_IN_OP = {
    "BnfastTrain": {"statistics_gradient"},
    "BnfastGrad": {
        "epsilon_bits",
        "parameter_type",
    },  # for the second derivative; for a gradient without gamma and beta
}
OP_PLUMBING = {"T", "U", "W"}  # dtypes; num_* count optional inputs


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_binding_has_the_order_of_functional(name):
    function, _ = FUNCTIONS[name]
    assert names(getattr(_core, name)) == names(function)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_validation_has_the_order_of_functional(name):
    function, validation = FUNCTIONS[name]
    assert names(validation) == names(function)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stub_has_the_order_of_the_binding(name):
    (stub,) = (node for node in STUB.body if isinstance(node, ast.FunctionDef) and node.name == name)
    assert [argument.arg for argument in stub.args.posonlyargs] == names(getattr(_core, name))


@pytest.mark.parametrize(("op", "name"), [("BnfastTrain", "train"), ("BnfastGrad", "grad")])
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
    given = [OP_FORMS.get(one, one) for one in wanted]
    optional = [one for one in dict.fromkeys(given) if one in inputs[3:]]
    assert set(inputs[3:]) == set(optional), "three required inputs precede the optional ones"
