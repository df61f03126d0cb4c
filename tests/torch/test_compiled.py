"""The dispatched ops: torch.compile, torch.export, fake tensors, dispatch modes."""

import copy

import bnfast.torch as bt
import pytest
import torch
from torch_samples import DispatchedOps, close


def model(order=torch.contiguous_format):
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten())
    made = torch.nn.Sequential(*layers, torch.nn.Linear(8 * 36, 16), torch.nn.BatchNorm1d(16)).double()
    return made.to(memory_format=order)


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(module, x, steps=2):
    for _ in range(steps):
        module(x).square().sum().backward()
    parameters = [p.grad for p in module.parameters()]
    return [*parameters, *(b.clone() for b in module.state_dict().values()), module(x)]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_takes_the_model_whole(compiler, backend, order):
    theirs = model(order)
    ours = bt.accelerate(copy.deepcopy(theirs))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).to(memory_format=order)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    close(train(compiled, x), train(theirs, x), 1e-8)
    with torch.no_grad():
        close(compiled.eval()(x), theirs.eval()(x), 1e-8)


def test_compile_calls_our_ops(compiler):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    ours = bt.accelerate(model())
    torch.compile(ours, fullgraph=True, backend=backend)(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert sum("bnfast.batch_norm_train" in str(node.target) for node in graphs[0].graph.nodes) == 2


def test_compile_with_dynamic_shapes(compiler):
    ours, theirs = bt.BatchNorm2d(6), torch.nn.BatchNorm2d(6)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(4, 6, 5, 5), (7, 6, 3, 9)]:
        x = torch.randn(shape)
        close(compiled(x), theirs(x))
    close([*ours.state_dict().values()], [*theirs.state_dict().values()])


@pytest.mark.parametrize("strict", [True, False])
def test_export_holds_pytorchs_ops_alone(compiler, strict):
    theirs = model().eval()
    ours = bt.accelerate(copy.deepcopy(theirs))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    program = torch.export.export(ours, (x,), strict=strict)
    assert not any("bnfast" in str(node.target) for node in program.graph.nodes)
    close(program.module()(x), theirs(x), 1e-8)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(compiler, dtype, order, activation):
    make = lambda *shape: torch.rand(*shape).to(dtype).requires_grad_()  # noqa: E731
    x = make(4, 3, 5, 5).detach().to(memory_format=order).requires_grad_()
    moving = make(3).detach(), make(3).detach()
    for residual in (None, make(4, 3, 5, 5)):
        rest = (1e-3, activation, 0.2)
        for parameters in ((make(3), make(3)), (None, make(3)), (None, None)):
            torch.library.opcheck(
                torch.ops.bnfast.batch_norm_train.default, (x, *parameters, residual, *moving, 0.9, *rest)
            )
            torch.library.opcheck(torch.ops.bnfast.batch_norm_infer.default, (x, *parameters, residual, *moving, *rest))
    torch.library.opcheck(torch.ops.bnfast.batch_norm_train.default, (x, None, None, None, None, None, 0.9, *rest))


def test_dispatched_second_order():
    mode = DispatchedOps()

    def function(x, gamma, beta):
        with mode:
            return bt.batch_norm(x, None, None, gamma, beta, True, activation="silu")

    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 4), (2,), (2,))]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert "bnfast.batch_norm_train.default" in mode.names


def test_dispatched_inference():
    module = bt.BatchNorm2d(6).eval()
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    with DispatchedOps() as mode:
        y = module(x)
    assert "bnfast.batch_norm_infer.default" in mode.names
    z = module(x)
    close([y, *torch.autograd.grad(y.sum(), x)], [z, *torch.autograd.grad(z.sum(), x)])


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        module = bt.BatchNorm2d(6)
        x = torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last)
        y = module(x)
        y.sum().backward()
    assert type(y).__name__ == "FakeTensor"
    assert y.stride() == x.stride()
    assert type(module(x)).__name__ == "FakeTensor", "also outside of the mode"
