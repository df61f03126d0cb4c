"""fuse and compiler: what follows a batch norm in a compiled model, held against PyTorch's own model in eager mode."""

import copy

import bnfast.torch as bt
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch_samples import close

CHANNELS = 4
SHAPE = (3, CHANNELS, 5, 5)


class Block(nn.Module):
    """Two convolutions and two batch norms; `body` says what it computes of them."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(1)
        self.body = body
        self.conv, self.shortcut = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.norm, self.other = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
        for norm in (self.norm, self.other):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.5)

    def forward(self, x):
        return self.body(self, x)


def activated(activation):
    return lambda block, x: activation(block.norm(block.conv(x)))


def added(block, x):
    return block.norm(block.conv(x)) + x


def residual(block, x):
    return functional.relu(block.norm(block.conv(x)) + x)


def residual_in_place(block, x):
    y = block.norm(block.conv(x))
    y += x
    return functional.relu(y, inplace=True)


def residual_before(block, x):
    return torch.add(x, block.norm(block.conv(x))).relu_()


def downsampled(block, x):
    y = block.norm(block.conv(x))
    return torch.relu(y + block.other(block.shortcut(x)))


def downsampled_first(block, x):
    shortcut = block.other(block.shortcut(x))
    return torch.relu(block.norm(block.conv(x)) + shortcut)


def twice(block, x):
    return functional.relu(block.norm(functional.relu(block.norm(block.conv(x)))))


def in_a_checkpoint(block, x):
    inner = lambda x: functional.relu(block.norm(block.conv(x)) + x)  # noqa: E731
    return checkpoint(inner, x, use_reentrant=False)


def read_twice(block, x):
    y = block.norm(block.conv(x))
    return functional.relu(y) + torch.sin(y)


def sum_read_twice(block, x):
    total = block.norm(block.conv(x)) + x
    return functional.relu(total) * total


def returned(block, x):
    y = block.norm(block.conv(x))
    return functional.relu(y) * 2, y


def changed_in_place(block, x):
    y = block.norm(block.conv(x))
    z = functional.relu(y)
    y.mul_(2)
    return z + y


def added_to_residual_in_place(block, x):
    shortcut = torch.sin(x)
    shortcut += block.norm(block.conv(x))
    return functional.relu(shortcut)


def residual_changed(block, x):
    shortcut = torch.sin(x)
    y = block.norm(block.conv(x))
    shortcut.mul_(3)
    return functional.relu(y + shortcut)


def view_of_residual_changed(block, x):
    shortcut = torch.sin(x)
    view = shortcut[:, 1:]
    y = block.norm(block.conv(x))
    view.mul_(3)
    return functional.relu(y + shortcut)


def residual_of_itself(block, x):
    y = block.norm(block.conv(x))
    return functional.relu(y + y)


def broadcast_residual(block, x):
    shortcut = x.mean((2, 3), keepdim=True)
    return functional.relu(block.norm(block.conv(x)) + shortcut)


def wider_residual(block, x):
    shortcut = x.double()
    return functional.relu(block.norm(block.conv(x)) + shortcut)


def scaled_sum(block, x):
    return functional.relu(torch.add(block.norm(block.conv(x)), x, alpha=2))


def number_added(block, x):
    return functional.relu(block.norm(block.conv(x)) + 1)


def activation_without_gradient(block, x):
    y = block.norm(block.conv(x))
    with torch.no_grad():
        z = functional.relu(y)
    return z * x


def norm_without_gradient(block, x):
    with torch.no_grad():
        y = block.norm(block.conv(x))
    return functional.relu(y) * x


def sum_in_autocast(block, x):
    y = block.norm(block.conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        return functional.relu(y + x)


def activated_before(block, x):
    """The model fuses its activation itself; what follows is another one."""
    norm = block.norm
    y = bt.batch_norm(block.conv(x), None, None, norm.weight, norm.bias, True, activation="silu")
    return functional.relu(y)


def only_statistics(block, x):
    block.norm(block.conv(x))
    return functional.relu(x)


def clipped(block, x):
    return functional.hardtanh(block.norm(block.conv(x)), -1.0, 2.0)


def rising(block, x):
    return functional.leaky_relu(block.norm(block.conv(x)), -0.5)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu method": lambda y: y.relu(),
    "relu_ method": lambda y: y.relu_(),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "relu6": nn.ReLU6(inplace=True),
    "relu6 function": functional.relu6,
    "hardtanh": nn.Hardtanh(0, 6),
    "hardtanh by name": lambda y: functional.hardtanh(y, max_val=6.0, min_val=0.0),
    "leaky_relu": nn.LeakyReLU(0.3, inplace=True),
    "leaky_relu default": functional.leaky_relu,
    "silu": nn.SiLU(),
}
# How many batch norms got a residual, and which activations they got.
FUSED = {
    added: (1, []),
    residual: (1, ["relu"]),
    residual_in_place: (1, ["relu"]),
    residual_before: (1, ["relu"]),
    downsampled: (1, ["relu"]),
    downsampled_first: (1, ["relu"]),
    twice: (0, ["relu", "relu"]),
}
UNFUSED = [
    read_twice,
    returned,
    changed_in_place,
    added_to_residual_in_place,
    residual_changed,
    view_of_residual_changed,
    residual_of_itself,
    broadcast_residual,
    wider_residual,
    scaled_sum,
    number_added,
    activation_without_gradient,
    norm_without_gradient,
    sum_in_autocast,
    only_statistics,
    clipped,
    rising,
]


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recording:
    """A backend: `fuse`, and then PyTorch's way without Inductor. It keeps the graphs."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        from torch._dynamo import lookup_backend

        self.graphs.append(bt.fuse(graph))
        return lookup_backend("aot_eager")(graph, inputs)

    def found(self):
        """The number of residuals, the activations, and the nodes that still compute an activation or a sum."""
        nodes = [n for g in self.graphs for m in g.modules() if hasattr(m, "graph") for n in m.graph.nodes]
        norms = [n for n in nodes if str(n.target).startswith("bnfast.batch_norm_")]
        activations = [n.args[-2] for n in norms]
        return sum(n.args[3] is not None for n in norms), [one for one in activations if one is not None]


def run(module, x, steps=2):
    x = x.clone().requires_grad_()
    results = []
    for _ in range(steps):
        made = module(x * 1)
        made = made if isinstance(made, tuple) else (made,)
        sum(torch.sin(one).sum() for one in made).backward()
        results += [one.detach().clone() for one in made]
    gradients = [x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
    return [*results, *gradients, *(b.clone() for b in module.state_dict().values())]


def compiled(module, **kwargs):
    backend = Recording()
    return torch.compile(bt.accelerate(copy.deepcopy(module)), backend=backend, fullgraph=True, **kwargs), backend


def check(body, tolerance=1e-8, dtype=torch.float64, order=torch.contiguous_format, training=True):
    theirs = Block(body).to(dtype).to(memory_format=order).train(training)
    torch.manual_seed(2)
    x = torch.randn(SHAPE, dtype=dtype).to(memory_format=order)
    ours, backend = compiled(theirs)
    close(run(ours, x), run(theirs, x), tolerance)
    return backend.found()


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, training):
    wanted = "relu6" if name.startswith("hardtanh") else name.split()[0].removeprefix("torch.").rstrip("_")
    assert check(activated(ACTIVATIONS[name]), training=training) == (0, [wanted])


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("body", FUSED, ids=lambda body: body.__name__)
def test_sums_and_blocks(body, order):
    assert check(body, order=order) == FUSED[body]


LOOSE = {wider_residual: (1e-4, torch.float32), sum_in_autocast: (2e-2, torch.float64)}


@pytest.mark.parametrize(
    ("body", "bound"),
    [(body, LOOSE.get(body, (1e-8, torch.float64))) for body in UNFUSED],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_could_be_told_apart_stays(body, bound):
    assert check(body, *bound) == (0, [])


def test_a_batch_norm_with_an_activation_keeps_it():
    ours, backend = compiled(Block(activated_before).double())
    x = torch.randn(SHAPE, dtype=torch.float64)
    y = ours.norm(ours.conv(x)).detach()
    close(ours(x), functional.relu(functional.silu(y)), 1e-8)
    assert backend.found() == (0, ["silu"])


def test_a_sum_that_is_read_twice_is_fused_alone():
    assert check(sum_read_twice) == (1, [])


@pytest.mark.parametrize("activation", [functional.relu, functional.relu6, functional.silu, functional.leaky_relu])
def test_what_is_changed_in_place_afterwards(activation):
    """PyTorch keeps no residual, and of these only a ReLU keeps its result."""

    def body(block, x):
        shortcut = torch.sin(x)
        y = activation(block.norm(block.conv(x)) + shortcut)
        shortcut.mul_(3)
        if activation is not functional.relu:
            y.mul_(2)
        return y + shortcut

    assert check(body) == (1, ["relu"] if activation is functional.relu else [])


@pytest.mark.parametrize("activation", [functional.relu6, functional.silu, functional.leaky_relu])
def test_a_result_that_is_changed_in_place_afterwards(activation):
    name = activation.__name__
    assert check(lambda block, x: activation(block.norm(block.conv(x))).mul_(2)) == (0, [name])


def test_in_a_checkpoint():
    """The running statistics move once per step in a compiled checkpoint, in an eager one twice."""
    theirs = Block(residual).double()
    checkpointed = copy.deepcopy(theirs)
    checkpointed.body = in_a_checkpoint
    ours, backend = compiled(checkpointed)
    x = torch.randn(SHAPE, dtype=torch.float64)
    close(run(ours, x), run(theirs, x), 1e-8)
    assert backend.found() == (1, ["relu"])


def test_dynamic_shapes():
    theirs = Block(residual).double()
    ours, backend = compiled(theirs, dynamic=True)
    for shape in (SHAPE, (5, CHANNELS, 7, 4), (2, CHANNELS, 3, 9)):
        x = torch.randn(shape, dtype=torch.float64)
        close(ours(x), theirs(x), 1e-8)
    residuals, activations = backend.found()
    assert 1 <= residuals == len(activations) < 3, "not a graph per shape"
    close([*ours.state_dict().values()], [*theirs.state_dict().values()], 1e-8)


@pytest.mark.parametrize("whole", [True, False], ids=["autocast", "bfloat16"])
def test_half_precision(whole):
    """A fused sum is rounded once: it is at least as near to float64 as PyTorch's."""
    theirs = Block(activated(nn.ReLU())) if whole else Block(residual).bfloat16()
    exact = copy.deepcopy(theirs).double()
    ours, backend = compiled(theirs)
    x = torch.randn(SHAPE).bfloat16().to(torch.float32 if whole else torch.bfloat16)
    found = []
    for module, inputs in ((ours, x), (theirs, x), (exact, x.double())):
        inputs = inputs.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=whole and module is not exact):
            y = module(inputs)
        y.double().square().sum().backward()
        found.append((y.double(), inputs.grad.double()))
    for one, other, wanted in zip(*found, strict=True):
        assert (one - wanted).norm() <= 1.1 * (other - wanted).norm() + 1e-6
    assert backend.found() == (0 if whole else 1, ["relu"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_frozen_layers_and_a_layer_without_parameters(dtype):
    theirs = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.ReLU(), nn.BatchNorm1d(6), nn.ReLU6())
    theirs = theirs.to(dtype)
    theirs[3].eval().requires_grad_(False)
    ours, backend = compiled(theirs)
    x = torch.randn(9, 4, dtype=dtype)
    close(run(ours, x), run(theirs, x), 1e-8 if dtype is torch.float64 else 1e-4)
    assert backend.found() == (0, ["relu", "relu6"])


@pytest.mark.parametrize("changes", [False, True])
def test_a_hook_sees_what_it_saw(changes):
    def hook(module, given, y):
        seen.append(y.sum())
        return y * 2 if changes else None

    seen = []
    theirs = Block(activated(nn.ReLU())).double()
    theirs.norm.register_forward_hook(hook)
    ours, backend = compiled(theirs)
    x = torch.randn(SHAPE, dtype=torch.float64)
    close(ours(x), theirs(x), 1e-8)
    close(seen[0], seen[1], 1e-8)
    assert backend.found() == (0, [])


def test_the_whole_of_resnet50_and_mobilenet_v2():
    from bnfast.benchmark import torch_models

    for name, wanted in (("ResNet50", (16, ["relu"] * 49)), ("MobileNetV2", (10, ["relu6"] * 35))):
        theirs = torch_models.MODELS[name]().eval()
        ours, backend = compiled(theirs)
        with torch.no_grad():
            x = torch.randn(1, 3, 32, 32)
            close(ours(x), theirs(x), 1e-4)
        assert backend.found() == wanted


@pytest.mark.parametrize("keywords", [{}, {"options": {"max_autotune": False}}, {"mode": "reduce-overhead"}], ids=str)
def test_inductor(keywords):
    theirs = Block(residual)
    ours = torch.compile(bt.accelerate(copy.deepcopy(theirs)), backend=bt.compiler, fullgraph=True, **keywords)
    x = torch.randn(SHAPE)
    close(run(ours, x), run(theirs, x), 1e-4)
    code = torch._inductor.utils.run_and_get_code(ours, x.clone().requires_grad_())[1]
    assert not any(
        "relu" in line for text in code for line in text.splitlines() if "bnfast" not in line and "def " in line
    )


def test_nothing_else_is_touched():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    before = str(graph.graph)
    assert bt.fuse(graph) is graph
    assert str(graph.graph) == before
    with pytest.raises(RuntimeError, match="Unrecognized mode=wrong"):
        torch.compile(nn.ReLU(), backend=bt.compiler, mode="wrong")(torch.ones(2))
