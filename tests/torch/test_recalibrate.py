"""recalibrate: float64 NumPy over all data, PyTorch's update_bn, and nothing else of the module changed."""

import copy

import bnfast.torch as bt
import numpy as np
import pytest
import torch
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset


def net(norm=torch.nn.BatchNorm2d):
    torch.manual_seed(1)
    first, second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3)
    return torch.nn.Sequential(first, norm(8), torch.nn.ReLU(), torch.nn.Dropout(), second, norm(4, momentum=None))


def images(count, offset=30.0):
    generator = torch.Generator().manual_seed(2)
    drift = torch.linspace(0, 5, count)[:, None, None, None]  # so that batches differ
    return torch.randn(count, 3, 8, 8, generator=generator) * 2 + offset + drift


def snapshot(module):
    named = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [(m.training, getattr(m, "momentum", 0), getattr(m, "track_running_stats", 0)) for m in module.modules()]
    return named, modes, [len(m._forward_hooks) for m in module.modules()]


def assert_equal_state(a, b, but=()):
    assert a[1:] == b[1:]
    assert a[0].keys() == b[0].keys()
    assert {name for name in a[0] if not torch.equal(a[0][name], b[0][name])} == set(but)


STATISTICS = {f"{i}.{name}" for i in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [50, 16])
def test_equal_to_numpy_and_nothing_else_changes(accelerated, training, size):
    model = net().train(training)
    if accelerated:
        bt.accelerate(model)
    data, before = images(50), snapshot(model)
    found = bt.recalibrate(model, DataLoader(TensorDataset(data, torch.zeros(50)), batch_size=size))
    assert_equal_state(before, snapshot(model), but=STATISTICS)
    with torch.no_grad():
        x = model[0](data).numpy()  # the convolution's bits may differ with the batch's size by some 1e-7
    x = np.moveaxis(x.astype(np.float64), 1, -1).reshape(-1, 8)
    np.testing.assert_allclose(model[1].running_mean.numpy(), x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model[1].running_var.numpy(), x.var(0, ddof=1), rtol=1e-6)
    assert [(row.name, row.count, row.batches) for row in found.rows] == [
        ("1", 50 * 36, -(-50 // size)),
        ("5", 50 * 16, -(-50 // size)),
    ]
    old_mean, old_var = before[0]["1.running_mean"].numpy(), before[0]["1.running_var"].numpy()
    shift = (old_mean - x.mean(0)) / np.sqrt(x.var(0, ddof=1) + 1e-5)
    ratio = np.log2((old_var + 1e-5) / (x.var(0, ddof=1) + 1e-5))
    np.testing.assert_allclose(found.rows[0].mean_shift, np.sqrt(np.mean(shift**2)), rtol=1e-5)
    np.testing.assert_allclose(found.rows[0].variance_ratio, np.sqrt(np.mean(ratio**2)), rtol=1e-5)
    assert found.left == {}


def test_against_update_bn():
    """Equal batches: the same means; the variances differ by that between the batches, which update_bn leaves out."""
    batches = list(images(48).split(16))
    theirs, ours, means = net(), net(), {1: [], 5: []}
    for model in (theirs, ours):
        model[3].p = 0.0
    for i, found in means.items():
        theirs[i].register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].double().mean((0, 2, 3))))
    update_bn(batches, theirs)
    bt.recalibrate(ours, batches)
    for i, found in means.items():
        n = 16 * (36 if i == 1 else 16)
        torch.testing.assert_close(ours[i].running_mean, theirs[i].running_mean, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours[i].num_batches_tracked, theirs[i].num_batches_tracked)
        between = n * torch.stack(found).var(0, correction=0) * 3
        expected = (theirs[i].running_var.double() * 3 * (n - 1) + between) / (3 * n - 1)
        torch.testing.assert_close(ours[i].running_var.double(), expected, rtol=1e-5, atol=0)
    assert not torch.allclose(ours[1].running_var, theirs[1].running_var, rtol=1e-2)


def test_a_mean_far_from_0():
    """float32 sums of squares would lose all digits of the variance."""
    x = images(40, offset=1e4)
    norm = torch.nn.BatchNorm2d(3)
    bt.recalibrate(norm, x.split(8))
    expected = np.moveaxis(x.double().numpy(), 1, -1).reshape(-1, 3)
    np.testing.assert_allclose(norm.running_var.numpy(), expected.var(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_formats(dtype, memory_format):
    x = images(20).to(dtype, memory_format=memory_format)
    norm = torch.nn.BatchNorm2d(3, dtype=dtype)
    bt.recalibrate(norm, [x[:8], (x[8:], "label")], device="cpu")
    expected = np.moveaxis(x.double().numpy(), 1, -1).reshape(-1, 3)
    bound = {torch.float64: 1e-10, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(norm.running_mean.double().numpy(), expected.mean(0), rtol=bound)
    np.testing.assert_allclose(norm.running_var.double().numpy(), expected.var(0, ddof=1), rtol=bound)
    assert norm.running_var.dtype == dtype


class Several(torch.nn.Module):
    """One batch norm called twice, once by name; one never called; one without statistics; another layer's buffers."""

    def __init__(self):
        super().__init__()
        self.shared, self.unused = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
        self.without = torch.nn.BatchNorm1d(3, track_running_stats=False)
        self.instance = torch.nn.InstanceNorm1d(3, track_running_stats=True)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.instance(x)
        return self.without(self.shared(input=self.shared(x)))


def test_shared_unused_and_other_buffers():
    model, x = Several(), torch.randn(30, 3, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    model.calls.fill_(7)
    before = snapshot(model)
    found = bt.recalibrate(model, [x])
    names = {"shared.running_mean", "shared.running_var", "shared.num_batches_tracked"}
    assert_equal_state(before, snapshot(model), but=names)
    assert [(row.name, row.count, row.batches) for row in found.rows] == [("shared", 240, 2)]
    assert found.left == {"unused": "it was not called with values"}
    first = np.moveaxis(x.double().numpy(), 1, -1).reshape(-1, 3)
    both = np.concatenate([first, (first - first.mean(0)) / np.sqrt(first.var(0) + 1e-5)])
    np.testing.assert_allclose(model.shared.running_var.numpy(), both.var(0, ddof=1), rtol=1e-5)


def test_a_norm_that_counts_no_batches():
    norm = torch.nn.BatchNorm2d(3)
    norm.num_batches_tracked = None
    x = images(20)
    assert bt.recalibrate(norm, [x]).rows[0].batches == 1
    assert norm.num_batches_tracked is None
    torch.testing.assert_close(norm.running_mean, x.double().mean((0, 2, 3)).float())


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_module(fullgraph):
    norm, x = torch.nn.BatchNorm2d(3).eval(), images(20)
    compiled = torch.compile(norm, backend="eager", fullgraph=fullgraph)
    compiled(x)
    assert bt.recalibrate(compiled, x.split(10)).rows[0].count == 20 * 64
    inner = torch.nn.Sequential(torch.compile(copy.deepcopy(norm), backend="eager"))
    assert bt.recalibrate(inner, x.split(10)).rows[0].count == 20 * 64


def failing(batches, error):
    yield from batches
    raise error


X = images(20)
BAD = {
    "no module": (TypeError, "module must be a torch.nn.Module", lambda m: (None, [X])),
    "no norm": (ValueError, "batch norm with running statistics", lambda m: (torch.nn.Linear(2, 2), [X])),
    "none called": (ValueError, "calls none of its batch norms", lambda m: (Uncalled(m), [X])),
    "lazy": (ValueError, "'1' is lazy", lambda m: (torch.nn.Sequential(m, torch.nn.LazyLinear(3)), [X])),
    "a tensor": (TypeError, "batches must be an iterable", lambda m: (m, X)),
    "a number": (TypeError, "batches must be an iterable", lambda m: (m, 3)),
    "empty": (ValueError, "at least one batch", lambda m: (m, [])),
    "no tensor": (TypeError, "batch 1 must be a tensor.* Received: str", lambda m: (m, [X, ("a", X)])),
    "empty tuple": (TypeError, "batch 0 must be a tensor.* Received: tuple", lambda m: (m, [()])),
    "nan": (FloatingPointError, "'1' sees NaN or Inf in call 2", lambda m: (m, [X, X * float("nan")])),
    "one value": (ValueError, "more than 1 value per channel", lambda m: (m, [X, X[:1, :, :5, :5]])),
    "channels": (RuntimeError, "channels", lambda m: (m, [X, X[:, :2]])),
    "data fails": (KeyboardInterrupt, "^$", lambda m: (m, failing([X], KeyboardInterrupt()))),
    "float16 overflows": (FloatingPointError, "batch norm '1' don't fit", lambda m: (m[:2].half(), [X.half() * 400])),
}


class Uncalled(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return x


@pytest.mark.parametrize(("error", "message", "arguments"), [*BAD.values()], ids=[*BAD])
def test_an_error_changes_nothing(error, message, arguments):
    model = net()
    module, batches = arguments(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        bt.recalibrate(module, batches)
    assert_equal_state(before, snapshot(model))


def test_gradients_are_not_recorded():
    seen, model = [], net()
    model[5].register_forward_hook(lambda *call: seen.append(call[-1].requires_grad))
    bt.recalibrate(model, [X.clone().requires_grad_()])
    assert seen == [False]
    assert torch.is_grad_enabled()


def test_several_processes_are_refused(monkeypatch):
    """Each would set the statistics of its own data."""
    model = bt.accelerate(torch.nn.SyncBatchNorm(3))
    assert bt.recalibrate(model, [X]).rows[0].count == 20 * 64
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 1)
    assert bt.recalibrate(model, [X]).rows[0].count == 20 * 64
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match=r"must be in one process\. Received: a group of 2"):
        bt.recalibrate(model, [X])
