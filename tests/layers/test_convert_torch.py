"""Conversion between the NumPy layer and PyTorch: training continues the same on both sides."""

import numpy as np
import pytest
from bnfast import BatchNormalization
from conversion import batches, close, trained


@pytest.fixture
def torch(need):
    return need("torch")


def torch_module(torch, cls="BatchNorm1d", **options):
    """A module with random parameters and running statistics."""
    module = getattr(torch.nn, cls)(4, **options)
    with torch.no_grad():
        if module.affine:
            module.weight.copy_(torch.tensor([1.5, -0.5, 2.0, 0.25]))
            module.bias.copy_(torch.tensor([0.5, 0.0, -1.0, 3.0]))
        for x in batches(seed=3):
            module(torch.from_numpy(x))
    return module


def continue_together(layer, module, torch):
    for x in batches(seed=4):
        close(layer(x, training=True), module.train()(torch.from_numpy(x)).detach())
        close(layer.moving_mean, module.running_mean)
        close(layer.moving_variance, module.running_var)
    x = batches(1, seed=5)[0]
    close(layer(x), module.eval()(torch.from_numpy(x)).detach())


@pytest.mark.parametrize("momentum", [0.1, 0.25, 0.99, 0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_training_continues_after_from_torch(torch, momentum, eps):
    module = torch_module(torch, momentum=momentum, eps=eps)
    layer = BatchNormalization.from_torch(module)
    assert layer.correction == 1
    assert layer.epsilon == eps
    assert layer.momentum == pytest.approx(1 - momentum, abs=1e-15)
    assert layer.axis == 1
    continue_together(layer, module, torch)


def test_population_variance_would_drift_apart_from_torch(torch):
    """The reason for correction=1: with 7 rows, running_var grows by up to 7/6."""
    module = torch_module(torch, momentum=0.5)
    layer = BatchNormalization.from_torch(module)
    layer.correction = 0
    for x in batches(seed=4):
        layer(x, training=True)
        module(torch.from_numpy(x))
    ratio = module.running_var.numpy() / layer.moving_variance
    assert (ratio > 1.1).all()


def test_training_continues_after_to_torch(torch):
    layer = trained(momentum=0.9, epsilon=1e-4, correction=1)
    module = layer.to_torch(torch.nn.BatchNorm1d(4))
    assert module.eps == 1e-4
    assert module.momentum == 0.1
    continue_together(layer, module, torch)


def test_torch_round_trips(torch):
    module = torch_module(torch)
    plain = BatchNormalization.from_torch(module).to_torch()
    assert plain["eps"] == 1e-5
    assert plain["momentum"] == 0.1
    assert list(plain["state_dict"]) == ["weight", "bias", "running_mean", "running_var"]
    for name, array in plain["state_dict"].items():
        assert np.array_equal(array, module.state_dict()[name].numpy())
    fresh = torch.nn.BatchNorm1d(4, eps=plain["eps"], momentum=plain["momentum"])
    fresh.load_state_dict({name: torch.from_numpy(a) for name, a in plain["state_dict"].items()})
    again = BatchNormalization.from_torch(plain)
    assert again.momentum == 0.9
    continue_together(again, fresh, torch)


def test_bare_torch_state_dict_needs_eps_and_momentum(torch):
    state = torch_module(torch).state_dict()
    for settings in ({}, {"eps": 1e-5}, {"momentum": 0.1}):
        with pytest.raises(ValueError, match=r"eps and momentum must be passed with a state dict. Received: eps="):
            BatchNormalization.from_torch(state, **settings)
    layer = BatchNormalization.from_torch(state, eps=1e-5, momentum=0.1, axis=-1)
    assert layer.axis == -1
    assert np.array_equal(layer.gamma, state["weight"].numpy())


def test_cumulative_averages_and_torch(torch):
    """momentum=None on both sides; the count is converted too."""
    module = torch_module(torch, momentum=None)
    layer = BatchNormalization.from_torch(module)
    assert layer.momentum is None
    assert layer.batches == 5
    continue_together(layer, module, torch)
    other = layer.to_torch(torch.nn.BatchNorm1d(4))
    assert other.momentum is None
    continue_together(layer, other, torch)
    plain = layer.to_torch()
    assert plain["momentum"] is None
    assert plain["state_dict"]["num_batches_tracked"] == layer.batches == 15
    continue_together(BatchNormalization.from_torch(plain), other, torch)
    assert BatchNormalization.from_torch(module, momentum=0.2).momentum == 0.8
    del plain["state_dict"]["num_batches_tracked"]
    with pytest.raises(ValueError, match="source must have running_mean and running_var and num_batches_tracked"):
        BatchNormalization.from_torch(plain)


def test_torch_without_affine_or_statistics(torch):
    layer = BatchNormalization.from_torch(torch_module(torch, affine=False))
    assert layer.gamma is None
    assert layer.beta is None
    assert layer.to_torch(torch.nn.BatchNorm1d(4, affine=False)).eps == 1e-5
    with pytest.raises(ValueError, match=r"target must have a gamma|target must have no gamma"):
        layer.to_torch(torch.nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"running_mean and running_var \(track_running_stats=True\)"):
        BatchNormalization.from_torch(torch.nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(TypeError, match=r"source must be a torch BatchNorm module or a mapping. Received: Linear"):
        BatchNormalization.from_torch(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("kind", "wanted"), [("float16", "f4"), ("bfloat16", "f4"), ("float64", "f8")])
def test_torch_dtypes(torch, kind, wanted):
    module = torch_module(torch).to(getattr(torch, kind))
    layer = BatchNormalization.from_torch(module)
    assert layer.gamma.dtype == layer.moving_variance.dtype == np.dtype(wanted)
    assert np.array_equal(layer.moving_mean, module.running_mean.double().numpy())


def test_to_torch_errors_leave_the_target_alone(torch):
    layer, module = trained(correction=1), torch_module(torch)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"activation must be None.*Received: 'relu'"):
        trained(correction=1, activation="relu").to_torch(module)
    with pytest.raises(ValueError, match=r"target's gamma must have shape \(4,\). Received: \(5,\)"):
        layer.to_torch(torch.nn.BatchNorm1d(5))
    with pytest.raises(TypeError, match=r"target's gamma must have dtype float32.*Received: float64"):
        layer.to_torch(torch.nn.BatchNorm1d(4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"no state before it is built"):
        BatchNormalization().to_torch()
    with pytest.warns(UserWarning, match=r"PyTorch averages sample variances, but this layer has correction=0"):
        trained().to_torch()
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert module.momentum == 0.1


def test_options_that_torch_lacks(torch):
    for kwargs, text in (
        ({"axis": (1, 2)}, r"axis must be one axis, as in PyTorch's BatchNorm. Received: \(1, 2\)"),
        (
            {"virtual_batch_size": 7},
            "virtual_batch_size must be None, as PyTorch's BatchNorm has no other. Received: 7",
        ),
        ({"nan_policy": "raise"}, "nan_policy must be 'propagate', as PyTorch's.*Received: 'raise'"),
        ({"activation": "relu"}, "activation must be None, as PyTorch's.*Received: 'relu'"),
    ):
        layer = BatchNormalization(**kwargs)
        layer(np.ones((7, 2, 2), np.float32), training=True)
        with pytest.raises(ValueError, match=text):
            layer.to_torch()
