"""Gradients of torch tensors through bnfast.cuda, against torch's own batch norm in float64."""

from typing import Any

import numpy as np
import pytest
from fake_cuda import Driver, Namespace

pytest.importorskip("torch")
import torch
from bnfast.cuda import libraries
from bnfast.cuda.autograd import batch_norm


@pytest.fixture
def xp(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """torch's engine makes gradients as plain tensors: here they pass for the device's, too."""
    namespace, own = Namespace("torch", monkeypatch, driver), libraries.Torch.view
    on_device = namespace.classes[0]
    monkeypatch.setattr(
        libraries.Torch, "view", lambda self, name, value: own(self, name, value.as_subclass(on_device))
    )
    return namespace


def reference(
    x: Any, gamma: Any, beta: Any, residual: Any, moving: Any, training: bool, activation: str | None, axis: int
) -> Any:
    """The same in torch's ops on the CPU, where axis 1 holds the channels."""
    given = x.movedim(axis, 1)
    y = torch.nn.functional.batch_norm(given, *moving, gamma, beta, training=training, momentum=0.25, eps=1e-3)
    y = y.movedim(1, axis)
    y = y if residual is None else y + residual
    return {None: lambda z: z, "relu": torch.relu, "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, 0.2)}[
        activation
    ](y)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("axis", [1, -1])
def test_values_gradients_and_statistics(
    xp: Namespace, training: bool, residual: bool, activation: str | None, axis: int
) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(0.5, 2, (6, 5, 4, 3)) for name in ("x", "dy", "residual")}
    C = arrays["x"].shape[axis]
    arrays |= {name: rng.uniform(0.5, 2, C) for name in ("gamma", "beta", "mean", "variance")}
    names = ["x", "gamma", "beta", *(["residual"] if residual else [])]
    results = []
    for ours in (True, False):
        tensors = {name: xp.to(array) if ours else torch.from_numpy(array.copy()) for name, array in arrays.items()}
        for name in names:
            tensors[name].requires_grad_()
        x, gamma, beta = (tensors[name] for name in ("x", "gamma", "beta"))
        added = tensors["residual"] if residual else None
        moving = tensors["mean"], tensors["variance"]
        if ours:
            kwargs = {"momentum": 0.75, "correction": 1, "activation": activation, "residual": added, "axis": axis}
            y = batch_norm(x, gamma, beta, *moving, training=training, **kwargs)
        else:
            y = reference(x, gamma, beta, added, moving, training, activation, axis)
        (y * tensors["dy"]).sum().backward()
        results.append([y, *(tensors[name].grad for name in names), *moving])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(xp.host(a), b.detach().numpy(), rtol=1e-9, atol=1e-9)


def test_a_model_learns(xp: Namespace) -> None:
    """Two layers with a batch norm between, trained by torch's optimizer: the loss falls to a tenth."""
    rng = np.random.default_rng(1)
    x, wanted = xp.to(rng.normal(size=(64, 8)).astype("float32")), xp.to(rng.normal(size=(64, 1)).astype("float32"))
    sizes = {"a": (8, 64), "gamma": (64,), "beta": (64,), "b": (64, 1)}
    weights = {name: xp.to(rng.normal(0, 0.3, size).astype("float32")).requires_grad_() for name, size in sizes.items()}
    moving = xp.to(np.zeros(64, "float32")), xp.to(np.ones(64, "float32"))
    optimizer = torch.optim.Adam(weights.values(), 0.02)
    losses = []
    for _ in range(60):
        z = batch_norm(x @ weights["a"], weights["gamma"], weights["beta"], *moving, activation="relu")
        loss = ((z @ weights["b"] - wanted) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    assert not np.allclose(xp.host(moving[0]), 0)


def test_a_gradient_in_another_order_of_memory_is_copied(xp: Namespace) -> None:
    x = xp.to(np.random.default_rng(0).normal(size=(4, 3, 5)).astype("float32")).requires_grad_()
    batch_norm(x).sum().backward()  # dy is one expanded value, with strides of 0
    np.testing.assert_allclose(xp.host(x.grad), 0, atol=1e-6)


def test_it_is_differentiable_once(xp: Namespace) -> None:
    x = xp.to(np.random.default_rng(0).normal(size=(4, 3)).astype("float32")).requires_grad_()
    (dx,) = torch.autograd.grad((batch_norm(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
