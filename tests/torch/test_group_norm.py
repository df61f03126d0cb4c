"""bnfast.torch's group, layer and instance norm against PyTorch's own and against the NumPy functions."""

import copy

import bnfast
import bnfast.torch as bt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch_samples import DispatchedOps, close, copied, module_samples, op_samples, outcome

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MODULES = {
    "GroupNorm": [(3, 6), (4, 6, 5, 5)],
    "LayerNorm": [((5, 5),), (4, 6, 5, 5)],
    "InstanceNorm1d": [(6,), (4, 6, 25)],
    "InstanceNorm2d": [(6,), (4, 6, 5, 5)],
    "InstanceNorm3d": [(6,), (4, 6, 5, 5, 2)],
}


def group(functions, x, gamma, beta):
    return functions.group_norm(x, 3, gamma, beta, 1e-3)


def layer(functions, x, gamma, beta):
    return functions.layer_norm(x, (5, 5), *(None if v is None else torch.ger(v[:5], v[:5]) for v in (gamma, beta)))


def last(functions, x, gamma, beta):
    return functions.layer_norm(x, (5,), *(None if v is None else v[:5] for v in (gamma, beta)), 1e-3)


def instance(functions, x, gamma, beta):
    return functions.instance_norm(x, None, None, gamma, beta, eps=1e-3)


NORMS = [group, layer, last, instance]


def tensors(dtype=torch.float64, order="contiguous", shape=(4, 6, 5, 5)):
    """x, dy, gamma, beta; parameters are float32 for half types."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    x, dy = (normal(*shape).to(dtype) for _ in range(2))
    if order == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    if order == "sliced":
        x, dy = (torch.stack([t, t], -1)[..., 0] for t in (x, dy))
    wide = dtype if dtype == torch.float64 else torch.float32
    return [x, dy, normal(6).to(wide), normal(6).to(wide)]


def step(norm, functions, x, dy, gamma, beta):
    x, gamma, beta = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, gamma, beta))
    y = norm(functions, x, gamma, beta)
    return [y, *torch.autograd.grad(y, (x, gamma, beta), dy)]


@pytest.mark.parametrize("order", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_equals_pytorch(norm, dtype, order):
    given = tensors(dtype, order)
    ours = step(norm, bt, *given)
    close(ours[0], step(norm, F, *given)[0])
    right = step(norm, F, *(t.double() for t in given))
    for one, other in zip(ours, right, strict=True):
        limit = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5, torch.float64: 1e-10}[dtype]
        torch.testing.assert_close(one.double(), other, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_half_parameters(norm, dtype):
    given = [t.to(dtype) for t in tensors()]
    ours, theirs = step(norm, bt, *given), step(norm, F, *given)
    assert [t.dtype for t in ours] == [dtype] * 4
    close(ours[0], theirs[0])


def test_has_the_bits_of_the_numpy_functions():
    for order in ("contiguous", "channels_last"):
        x, dy, gamma, beta = tensors(torch.float32, order)
        back = (0, 2, 3, 1) if order == "channels_last" else (0, 1, 2, 3)
        axis = back.index(1)
        ours = step(group, bt, x, dy, gamma, beta)
        x, dy = x.permute(back), dy.permute(back)
        y, mean, invstd = bnfast.group_norm(x, 3, gamma, beta, axis=axis, epsilon=1e-3)
        dx, dgamma, dbeta = bnfast.group_norm_grad(dy, x, mean, invstd, 3, gamma, beta, axis=axis)
        ours = [t.detach().permute(back) if t.dim() == 4 else t for t in ours]
        for one, other in zip(ours, (y, dx, dgamma, dbeta), strict=True):
            assert one.numpy().tobytes() == np.asarray(other).tobytes()
    x, dy, gamma, beta = tensors(torch.float32)
    ours = step(last, bt, x, dy, gamma, beta)
    y, mean, invstd = bnfast.layer_norm(x, gamma[:5], beta[:5], epsilon=1e-3)
    dx, dgamma, _ = bnfast.layer_norm_grad(dy, x, mean, invstd, gamma[:5], beta[:5])
    for one, other in zip((ours[0], ours[1], ours[2][:5]), (y, dx, dgamma), strict=True):
        assert one.detach().numpy().tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("norm", NORMS)
def test_first_and_second_order_numerically(norm):
    x, _, gamma, beta = tensors(shape=(2, 6, 5, 5) if norm is layer else (2, 3, 2, 5))
    if norm is not layer:
        gamma, beta = (torch.cat([v[:3], v[:3]])[: 6 if norm is last else 3] for v in (gamma, beta))
    inputs = [t.detach().clone().requires_grad_() for t in (x, gamma, beta)]
    if norm is layer:
        inputs[0] = x[:1, :2].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: norm(bt, *args), inputs)
    assert torch.autograd.gradgradcheck(lambda *args: norm(bt, *args), inputs)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_activation_and_residual(activation):
    for with_residual in (False, True):
        shape = (2, 6, 5)
        residual = torch.randn(shape, dtype=torch.float64, requires_grad=True) if with_residual else None
        inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, 6, 6, 5, 5)]

        def ours(x, g, b, lg, lb, *residual):
            kwargs = {"activation": activation, "residual": residual[0] if residual else None}
            return bt.group_norm(x, 2, g, b, **kwargs) + bt.layer_norm(x, (5,), lg, lb, **kwargs)

        def theirs(x, g, b, lg, lb, *residual):
            act, r = getattr(F, activation), residual[0] if residual else 0
            return act(F.group_norm(x, 2, g, b) + r) + act(F.layer_norm(x, (5,), lg, lb) + r)

        given = inputs + ([residual] if with_residual else [])
        results = [[f(*given), *torch.autograd.grad(f(*given).sin().sum(), given)] for f in (ours, theirs)]
        close(*results, 1e-9)
        assert torch.autograd.gradgradcheck(ours, given)
    with pytest.raises(ValueError, match="activation must be"):
        bt.layer_norm(torch.ones(2, 3), (3,), activation="swoosh")
    with pytest.raises(ValueError, match="residual must be"):
        bt.group_norm(torch.ones(2, 4), 2, residual=torch.ones(3))


def test_a_residual_alone():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 6, 5), 6, 6, (2, 6, 5))]

    def ours(x, g, b, residual):
        return bt.group_norm(x, 2, g, b, residual=residual)

    assert torch.autograd.gradgradcheck(ours, inputs)
    results = [
        [y, *torch.autograd.grad(y.sin().sum(), inputs)]
        for y in (ours(*inputs), F.group_norm(inputs[0], 2, *inputs[1:3]) + inputs[3])
    ]
    close(*results, 1e-9)


@pytest.mark.parametrize(("norm", "residual"), [(group, True), (last, True), (layer, True), (instance, False)])
def test_negated_views_are_read_with_their_sign(norm, residual):
    x, dy, gamma, beta = tensors()
    close(norm(bt, torch._neg_view(x), gamma, beta), norm(F, -x, gamma, beta))
    x = x.requires_grad_()
    ours, theirs = (norm(functions, x, gamma, beta) for functions in (bt, F))
    close(torch.autograd.grad(ours, x, torch._neg_view(dy)), torch.autograd.grad(theirs, x, -dy))
    if residual:
        y = bt.layer_norm(x, (5, 5), residual=torch._neg_view(dy), activation="relu")
        close(y, F.relu(F.layer_norm(x, (5, 5)) - dy))


# ---- PyTorch's own samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["group_norm", "layer_norm", "instance_norm"])
def test_opinfo_samples(name, dtype):
    for sample in op_samples(name, dtype):
        results = []
        for functions in (bt, F):
            x, *args = (copied(a) for a in (sample.input, *sample.args))
            kwargs = {key: copied(value) for key, value in sample.kwargs.items()}

            def run(functions=functions, x=x, args=args, kwargs=kwargs):
                y = getattr(functions, name)(x, *args, **kwargs)
                if y.dtype.itemsize == 2:  # dy, made of rounded values, differs too much to compare gradients
                    return y
                tensors = [t for t in (x, *args, *kwargs.values()) if isinstance(t, torch.Tensor)]
                leaves = [t for t in tensors if t.requires_grad]
                gradients = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
                return [y, *gradients, *(t.detach() for t in tensors)]

            results.append(outcome(run))
        if isinstance(results[1], tuple):
            assert results[0] == results[1]
        else:
            close(*results)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moduleinfo_samples(name, dtype):
    count = 0
    for training, sample in module_samples(name, dtype):
        made = sample.constructor_input
        theirs = getattr(torch.nn, name)(*made.args, **made.kwargs).to(dtype).train(training)
        ours = getattr(bt, name)(*made.args, **made.kwargs).to(dtype).train(training)
        ours.load_state_dict(theirs.state_dict())
        assert repr(ours) == repr(theirs)
        results = []
        for module in (ours, theirs):
            args = [copied(a) for a in sample.forward_input.args]

            def run(module=module, args=args):
                y = module(*args)
                y.square().sum().backward()
                return [y, args[0].grad, *(p.grad for p in module.parameters()), *module.state_dict().values()]

            results.append(outcome(run))
        if isinstance(results[1], list):
            close(*results)
        else:
            assert results[0] == results[1]
        count += 1
    assert count > 3


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_accelerated_modules_train_as_before(name):
    arguments, shape = MODULES[name]
    variants = [{}]
    if "Instance" in name:
        variants = [{}, {"affine": True, "track_running_stats": True}, {"affine": True, "momentum": None}]
    for kwargs in variants:
        theirs = getattr(torch.nn, name)(*arguments, **kwargs)
        ours = bt.accelerate(copy.deepcopy(theirs))
        assert isinstance(ours, getattr(bt, name))
        results = []
        for module in (ours, theirs):
            torch.manual_seed(0)
            x = torch.randn(shape, requires_grad=True)
            for _ in range(3):
                module(x).square().sum().backward()
            results.append([x.grad, *(p.grad for p in module.parameters()), *module.state_dict().values()])
            module.eval()
            results[-1].append(module(x))
        close(*results)
        assert [row.reason for row in bt.report(ours).rows] == [""]
        assert type(bt.to_torch(ours)) is type(theirs)


ODD = [
    lambda f, x: f.group_norm(x, True),
    lambda f, x: f.group_norm(x, 2.0),
    lambda f, x: f.group_norm(x, 0),
    lambda f, x: f.group_norm(x, 4),
    lambda f, x: f.group_norm(x[0, :, 0, 0], 2),
    lambda f, x: f.group_norm(x[:1, :, :1, :1], 6),
    lambda f, x: f.group_norm(x[:, :, :1, :1], 6),
    lambda f, x: f.layer_norm(x, (4,)),
    lambda f, x: f.layer_norm(x, ()),
    lambda f, x: f.layer_norm(x, (1, *x.shape)),
    lambda f, x: f.instance_norm(x[..., :1, :1]),
    lambda f, x: f.instance_norm(x, x[0, :, 0, 0]),
]


@pytest.mark.parametrize(("place", "call"), [*enumerate(ODD)])
def test_odd_calls_are_as_in_pytorch(place, call):
    x = torch.randn(4, 6, 5, 5)
    results = [outcome(lambda f=f: call(f, x)) for f in (bt, F)]
    if isinstance(results[1], tuple):
        assert results[0] == results[1]
    else:
        close(*results)


def test_a_nested_tensor_is_normalized_as_in_pytorch():
    x = [torch.randn(n, 8) for n in (3, 5)]
    nested = torch.nested.nested_tensor(x)
    ours, theirs = bt.LayerNorm(8), torch.nn.LayerNorm(8)
    made = [ours(nested), theirs(nested), bt.layer_norm(nested, (8,), ours.weight, ours.bias)]
    assert ours._bnfast_reason == "the input is nested or has layout torch.strided"
    for one in made:
        close([*one.unbind()], [theirs(part) for part in x])


@pytest.mark.parametrize(("name", "vector"), [("GroupNorm", (6,)), ("LayerNorm", (5, 5))])
def test_parametrized_parameters_are_used(name, vector):
    from torch.nn.utils import parametrize

    class Double(torch.nn.Module):
        def forward(self, w):
            return 2 * w

    arguments, shape = MODULES[name]
    x, weight = torch.randn(shape), torch.rand(vector)
    results = []
    for namespace in (bt, torch.nn):
        module = getattr(namespace, name)(*arguments)
        module.weight.data.copy_(weight)
        parametrize.register_parametrization(module, "weight", Double())
        results.append(module(x))
    close(*results)


@pytest.mark.parametrize("name", MODULES)
def test_odd_inputs_are_as_in_pytorch(name):
    arguments, shape = MODULES[name]
    ours, theirs = (getattr(n, name)(*arguments) for n in (bt, torch.nn))
    odd = [
        torch.empty(0, *shape[1:]),
        torch.ones(3),
        torch.ones(1, 6, *[1] * (len(shape) - 2)),
        torch.ones(shape).int(),
    ]
    odd += [torch.ones(shape).double(), torch.ones(shape[1:])]
    for x in odd:
        results = [outcome(lambda m=m, x=x: m(x)) for m in (ours, theirs)]
        if isinstance(results[1], tuple):
            assert results[0] == results[1]
        else:
            close(*results)


def test_fx_script_and_vmap():
    for name, (arguments, shape) in {**MODULES, "SyncBatchNorm": [(6,), (4, 6, 5)]}.items():
        ours, theirs = (getattr(n, name)(*arguments).eval() for n in (bt, torch.nn))
        nodes = torch.fx.symbolic_trace(torch.nn.Sequential(ours)).graph.nodes
        assert [node.op for node in nodes] == ["placeholder", "call_module", "output"]
        x = torch.randn(3, *shape)
        for _ in range(2):
            close(torch.vmap(ours)(x), torch.vmap(theirs)(x))
        if name != "SyncBatchNorm":
            assert ours._bnfast_reason == "a torch.func transformation (grad, vmap, jvp ...) is active"
            close(torch.jit.script(ours)(x[0]), theirs(x[0]))


@pytest.mark.parametrize("name", MODULES)
def test_tools_that_record_modules(name):
    arguments, shape = MODULES[name]
    ours, theirs = (getattr(n, name)(*arguments) for n in (bt, torch.nn))
    x = torch.randn(shape)
    program = torch.export.export(ours, (x,))
    assert not any("bnfast" in str(node.target) for node in program.graph.nodes)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    compiled(leaf).square().sum().backward()
    theirs(other).square().sum().backward()
    close(leaf.grad, other.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("grouping", [(3, 1), (0, 2)])
def test_opcheck(grouping, order, activation):
    make = lambda *shape: torch.rand(*shape, dtype=torch.float64).requires_grad_()  # noqa: E731
    x = make(4, 6, 5, 5).detach().to(memory_format=order).requires_grad_()
    vector = (6,) if grouping[0] else (5, 5)
    for residual in (None, make(4, 6, 5, 5)):
        for parameters in ((make(*vector), make(*vector)), (None, make(*vector)), (None, None)):
            given = x, *parameters, residual, *grouping, 1e-3, activation, 0.2
            torch.library.opcheck(torch.ops.bnfast.group_norm.default, given)


@pytest.mark.parametrize(("norm", "shape"), [(group, (2, 6, 4)), (last, (2, 3, 5)), (instance, (1, 6, 3))])
def test_dispatched_second_order(norm, shape):
    mode = DispatchedOps()

    def function(x, gamma, beta):
        with mode:
            return norm(bt, x, gamma, beta)

    x, _, gamma, beta = tensors(shape=shape)
    inputs = [t.requires_grad_() for t in (x, gamma, beta)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert "bnfast.group_norm.default" in mode.names


def test_a_gradient_that_is_none():
    """A Function may say so: nothing reaches the op's inputs, as in PyTorch."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    leaves = []
    for op in ("batch_norm_train", "group_norm"):
        x, _, gamma, beta = (t.requires_grad_() for t in tensors())
        rest = (None, None, 0.9) if op == "batch_norm_train" else (2, 1)
        y = getattr(torch.ops.bnfast, op)(x, gamma, beta, None, *rest, 1e-3, None, 0.2)[0]
        Stop.apply(y).sum().backward()
        leaves += [x, gamma, beta]
    assert [leaf.grad for leaf in leaves] == [None] * 6


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_many_gradients_at_once(order, activation):
    """jacobian(vectorize=True), gradcheck(check_batched_grad=True)."""
    x, residual = torch.randn(2, 2, 4, 3, 2, dtype=torch.float64).unbind()
    x, (gamma, beta) = x.to(memory_format=order), torch.randn(2, 4, dtype=torch.float64).unbind()

    def call(x, gamma, beta, residual):
        return bt.group_norm(x, 2, gamma, beta, activation=activation, residual=residual)

    at_once, in_turn = (
        torch.autograd.functional.jacobian(call, (x, gamma, beta, residual), vectorize=vectorize)
        for vectorize in (True, False)
    )
    close([t.contiguous() for t in at_once], [t.contiguous() for t in in_turn], 1e-12)
