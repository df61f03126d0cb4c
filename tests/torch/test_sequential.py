"""A batch norm and the activation after it in a Sequential: one pass, which nobody can tell from two."""

import copy
import io
import pickle
from collections import OrderedDict

import bnfast.torch as bt
import pytest
import torch
from bnfast.torch.modules.sequential import PLAIN_CLASSES, FusedSequential
from torch import nn

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.3),
    "leaky_relu of slope 1": lambda: nn.LeakyReLU(1),
}


class ConvNormActivation(nn.Sequential):
    """As torchvision derives its blocks: other arguments, Sequential's forward."""

    def __init__(self, inputs, outputs, activation):
        super().__init__(nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), activation)
        self.out_channels = outputs


class Doubled(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


def build(activation=nn.ReLU, dtype=torch.float32):
    """PyTorch's model. Channels 0 and 1 of the first batch norm are constant, at the edges of the activations."""
    torch.manual_seed(0)
    head = nn.Flatten(), nn.Linear(6 * 36, 5), nn.BatchNorm1d(5), activation(), nn.Linear(5, 2)
    model = nn.Sequential(ConvNormActivation(3, 4, activation()), ConvNormActivation(4, 6, activation()), *head)
    norm = model[0][1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 0.0, 4.0, 1.0]))
        norm.bias.copy_(torch.tensor([0.0, 6.0, 1.0, -1.0]))
    return model.to(dtype)


def unfused(model):
    """bnfast's batch norms in PyTorch's Sequentials."""
    model = bt.accelerate(copy.deepcopy(model))
    for module in model.modules():
        if isinstance(module, FusedSequential):
            module.__class__ = PLAIN_CLASSES[type(module)]
    return model


def step(model, x):
    """Everything that a training step or an inference call leaves behind."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.arange(1, 1 + y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def calls(monkeypatch):
    """The activations of the batch norm calls from now on."""
    seen = []
    own = bt.BatchNorm2d._activated

    def activated(self, input, activation, slope):
        seen.append(activation)
        return own(self, input, activation, slope)

    monkeypatch.setattr("bnfast.torch.modules.batch_norm.BatchNormForward._activated", activated)
    return seen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_same_bits_as_in_turn(name, dtype, order, training, monkeypatch):
    model = build(ACTIVATIONS[name], dtype).train(training)
    x = torch.randn(7, 3, 10, 10, dtype=dtype).to(memory_format=order)
    in_turn = step(unfused(model), x)
    seen = calls(monkeypatch)
    fused = step(bt.accelerate(copy.deepcopy(model)), x)
    assert seen == [name.split(" ")[0]] * 3
    for ours, theirs in zip(fused, in_turn, strict=True):
        assert torch.equal(ours, theirs)


def test_values_that_are_not_finite(monkeypatch):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU6()).eval()
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0]])
    expected = step(copy.deepcopy(model), x)
    seen = calls(monkeypatch)
    found = step(bt.accelerate(model), x)
    assert seen == ["relu6"]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def watch(model, what):
    """Lets something look at a batch norm or the activation after it, and returns what it saw."""
    seen = []
    _, norm, activation = model[0]
    if what == "forward hook of the norm":
        norm.register_forward_hook(lambda _, __, y: seen.append(y.detach().clone()))
    elif what == "pre-hook of the activation":
        activation.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    elif what == "backward hook of the activation":
        activation.register_full_backward_hook(lambda _, __, dy: seen.append(dy[0].clone()))
    elif what == "backward pre-hook of the norm":
        norm.register_full_backward_pre_hook(lambda _, dy: seen.append(dy[0].clone()))
    elif what == "assigned forward":
        own = activation.forward
        activation.forward = lambda x: (seen.append(x.detach().clone()), own(x))[1]
    return seen


@pytest.mark.parametrize(
    "what",
    [
        "forward hook of the norm",
        "pre-hook of the activation",
        "backward hook of the activation",
        "backward pre-hook of the norm",
        "assigned forward",
    ],
)
def test_who_looks_between_sees_what_lies_there(what, monkeypatch):
    model = build()
    x = torch.randn(7, 3, 10, 10)
    theirs, ours = unfused(model), bt.accelerate(copy.deepcopy(model))
    expected = watch(theirs, what)
    step(theirs, x)
    seen, found = calls(monkeypatch), watch(ours, what)
    step(ours, x)
    assert seen == [None, "relu", "relu"], "the other pairs are fused all the same"
    assert len(found) == len(expected) == 1
    assert torch.equal(found[0], expected[0])
    assert [row.fused for row in bt.report(ours).rows] == ["", "ReLU", "ReLU"]


class Counting(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


REPLACED = {
    "Module.__call__": (nn.Module, "__call__"),
    "Module._call_impl": (nn.Module, "_call_impl"),
    "Sequential.forward": (nn.Sequential, "forward"),
    "ReLU.forward": (nn.ReLU, "forward"),
    "F.relu": (torch.nn.functional, "relu"),
}


@pytest.mark.parametrize("what", ["a global hook", "a function mode", *REPLACED])
def test_who_looks_at_all_modules(what, monkeypatch):
    model, x = bt.accelerate(build()), torch.randn(7, 3, 10, 10)
    seen, looked = calls(monkeypatch), []
    with monkeypatch.context() as patch:
        if what == "a global hook":
            handle = nn.modules.module.register_module_forward_hook(lambda *_: looked.append(1))
            model(x)
            handle.remove()
        elif what == "a function mode":
            with Counting():
                model(x)
        else:
            owner, name = REPLACED[what]
            own = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, **kwargs: (looked.append(1), own(*args, **kwargs))[1])
            model(x)
    assert seen == [None] * 3
    assert bool(looked) == (what != "a function mode")
    model(x)
    assert seen[3:] == ["relu"] * 3


def test_a_default_device_looks_at_nothing(monkeypatch):
    model, seen = bt.accelerate(build()), calls(monkeypatch)
    with torch.device("cpu"):
        model(torch.randn(7, 3, 10, 10))
    assert seen == ["relu"] * 3


def test_a_batch_norm_whose_forward_was_replaced(monkeypatch):
    monkeypatch.setattr(bt.BatchNorm2d, "forward", lambda self, input: input * 0)
    assert torch.equal(
        bt.accelerate(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))(torch.ones(2, 3, 2, 2)).sum(), torch.tensor(0.0)
    )


def test_a_module_may_replace_the_ones_after_it():
    model = bt.accelerate(nn.Sequential(nn.Identity(), nn.BatchNorm1d(3), nn.ReLU()))
    x = torch.randn(7, 3)
    model[0].register_forward_hook(lambda *_: setattr(model, "2", nn.Identity()))
    assert torch.equal(model(x), model[1].train()(x))
    assert model(x).min() < 0
    model = bt.accelerate(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    model[0].register_forward_hook(lambda *_: model.append(nn.Identity()))
    with pytest.raises(RuntimeError, match=r"(mutated|changed size) during iteration"):
        model(x)


@pytest.mark.parametrize("case", ["half", "autocast", "vmap", "fx", "export"])
def test_other_calls_take_the_modules_in_turn(case, monkeypatch):
    model, x = build().eval(), torch.randn(7, 3, 10, 10)
    expected = model(x)
    accelerated = bt.accelerate(model)
    seen = calls(monkeypatch)
    if case == "half":
        accelerated.to(torch.bfloat16)(x.to(torch.bfloat16))
    elif case == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            accelerated(x)
    elif case == "vmap":
        torch.testing.assert_close(torch.vmap(accelerated)(x[None]), expected[None])
    elif case == "fx":
        traced = torch.fx.symbolic_trace(accelerated)
        assert [node.target for node in traced.graph.nodes][1:4] == ["0.0", "0.1", "0.2"]
        torch.testing.assert_close(traced(x), expected)
    else:
        program = torch.export.export(accelerated, (x,))
        assert not any("bnfast" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), expected)
    assert set(seen) <= {None}


def test_gradients_of_gradients():
    model = build(dtype=torch.float64)
    x = torch.randn(7, 3, 10, 10, dtype=torch.float64)

    def second(model):
        given = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(given).square().sum(), given, create_graph=True)
        model.zero_grad()
        dx.square().sum().backward()
        return [given.grad, *(p.grad for p in model.parameters())]

    for ours, theirs in zip(second(bt.accelerate(copy.deepcopy(model))), second(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3)], ids=str)
def test_gradients_of_gradients_at_the_gate(activation):
    """Values that the kernel's rounding puts on the gate itself: the formula's rounding puts some beyond it."""
    for seed in range(8):
        torch.manual_seed(seed)
        model, x, w = nn.Sequential(nn.BatchNorm1d(3), activation), torch.randn(16, 3), torch.randn(16, 3)
        with torch.no_grad():
            model[0].bias.copy_(-bt.BatchNorm1d(3)(x)[0])
        found = []
        for made in (unfused(model), bt.accelerate(copy.deepcopy(model))):
            given = x.clone().requires_grad_()
            (dx,) = torch.autograd.grad((made(given) * w).sum(), given, create_graph=True)
            dx.square().sum().backward()
            found.append(given.grad)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_model_is_the_same_to_its_owner(tmp_path):
    theirs = build()
    x = torch.randn(7, 3, 10, 10)
    ours = bt.accelerate(copy.deepcopy(theirs))
    assert repr(ours) == repr(theirs)
    assert isinstance(ours[0], ConvNormActivation)
    assert ours[0].out_channels == 4
    assert type(ours).__module__.startswith("bnfast.")
    expected = ours.eval()(x)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    copies = copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    for made in (*copies, torch.load(saved, weights_only=False)):
        assert [type(m) for m in made.modules()] == [type(m) for m in ours.modules()]
        assert torch.equal(made(x), expected)
    assert torch.equal(ours[2:](ours[:2](x)), expected)
    ours.append(nn.Softmax(1))
    assert torch.equal(ours(x), expected.softmax(1))
    assert torch.equal(torch.jit.script(ours[:-1])(x), theirs.eval()(x))
    back = bt.to_torch(ours[:-1])
    assert [type(m) for m in back.modules()] == [type(m) for m in theirs.modules()]
    assert pickle.loads(pickle.dumps(back))(x).equal(theirs(x))


def test_classes_with_ways_of_their_own_stay():
    layers = OrderedDict(norm=nn.BatchNorm1d(3), activation=nn.ReLU())
    own = Doubled(OrderedDict(copy.deepcopy(layers)))
    assigned = nn.Sequential(copy.deepcopy(layers))
    assigned.forward = lambda x: x
    far = nn.Sequential(nn.BatchNorm1d(3), nn.Identity(), nn.ReLU())
    smooth = nn.Sequential(nn.BatchNorm1d(3), nn.SiLU())
    for model in (own, assigned, far, smooth):
        kind = type(model)
        assert type(bt.accelerate(model)) is kind
        assert "ReLU" not in [row.fused for row in bt.report(model).rows]
    model = bt.accelerate(bt.accelerate(nn.Sequential(layers)))
    assert type(model).__bases__ == (FusedSequential, nn.Sequential)
    assert str(bt.report(model)).splitlines()[2].split() == ["norm", "BatchNorm1d", "bnfast", "ReLU"]


def limited(low, high):
    made = nn.ReLU6()
    made.min_val, made.max_val = low, high
    return made


@pytest.mark.parametrize(
    "activation",
    [nn.LeakyReLU(-0.5), nn.LeakyReLU(0.0), nn.LeakyReLU(2.0), limited(0.0, 1.0), limited(-1.0, 6.0)],
    ids=str,
)
def test_activations_that_the_kernels_do_not_compute(activation, monkeypatch):
    model, x = nn.Sequential(nn.BatchNorm1d(3), activation), 3 * torch.randn(70, 3)
    expected, seen = model(x), calls(monkeypatch)
    torch.testing.assert_close(bt.accelerate(model)(x), expected)
    assert seen == [None]
    assert bt.report(model).rows[0].fused == ""


def test_a_slope_that_is_no_number():
    model = bt.accelerate(nn.Sequential(nn.BatchNorm1d(3), nn.LeakyReLU("x")))
    assert bt.report(model).rows[0].fused == ""
    with pytest.raises(TypeError, match="negative_slope"):
        model(torch.randn(7, 3))


def test_integers_on_the_way(monkeypatch):
    model = bt.accelerate(nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.ReLU()))
    seen = calls(monkeypatch)
    model(torch.arange(5))
    assert seen == ["relu"]


class Tagged(nn.Sequential):
    def __init_subclass__(cls, *, tag, **kwargs):
        super().__init_subclass__(**kwargs)


class Scripted(nn.Sequential):
    def __prepare_scriptable__(self):
        return nn.Identity()


def test_classes_that_cannot_be_derived_from():
    for kind in (Tagged, Scripted):
        model = bt.accelerate(kind(nn.BatchNorm1d(3), nn.ReLU()))
        assert type(model) is kind
        assert type(model[0]) is bt.BatchNorm1d


def test_a_class_derived_from_ours():
    model, x = bt.accelerate(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())).eval(), torch.randn(7, 3)
    expected = model(x)
    model.__class__ = globals()["Derived"] = type("Derived", (type(model),), {"__module__": __name__})
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch.testing.assert_close(bt.to_torch(model)(x), expected)
    assert type(model[0]) is nn.BatchNorm1d


def test_a_graph_of_the_model_can_be_saved():
    model, x = bt.accelerate(build()).eval(), torch.randn(7, 3, 10, 10)
    graph = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model)))
    torch.testing.assert_close(graph(x), model(x))
    assert pickle.loads(pickle.dumps(type(model))) is type(model)


def test_errors_are_those_of_the_modules():
    model = bt.accelerate(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.zeros(1, 3, 1, 1))
    with pytest.raises(AttributeError, match="'list' object has no attribute 'dim'"):
        model([1.0])
