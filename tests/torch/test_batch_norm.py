"""bnfast.torch.batch_norm and the BatchNorm modules against PyTorch's own and against the NumPy functions."""

import copy
import io
import pickle
from pathlib import Path

import bnfast
import bnfast.torch as bt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch_samples import close, copied, module_samples, op_samples, outcome

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(8, 32), (5, 3, 7), (4, 6, 5, 7), (2, 3, 4, 5, 6), (3, 1, 2, 2), (2, 5, 1, 1), (1, 4, 3, 3)]
MODULES = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


def tensors(shape, dtype=torch.float64, order="contiguous", seed=0):
    """x, dy, gamma, beta, moving_mean, moving_variance; parameters are float32 for half types."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    C = shape[1]
    x, dy = (3 * normal(*shape)).to(dtype), normal(*shape).to(dtype)
    if order == "channels_last":
        form = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
        x, dy = x.contiguous(memory_format=form), dy.contiguous(memory_format=form)
    if order == "sliced":
        x, dy = torch.stack([x, x], -1)[..., 0], torch.stack([dy, dy], -1)[..., 1]
    wide = dtype if dtype == torch.float64 else torch.float32
    gamma, beta, mean, variance = normal(C), normal(C), normal(C), 1 + normal(C).abs()
    return [x, dy, *(v.to(wide) for v in (gamma, beta, mean, variance))]


def step(function, x, dy, gamma, beta, mean, variance, training=True, **kwargs):
    """y, dx, dgamma, dbeta and the moving statistics after a call of F.batch_norm or ours."""
    x, gamma, beta = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, gamma, beta))
    mean, variance = mean.clone(), variance.clone()
    y = function(x, mean, variance, gamma, beta, training, 0.3, 1e-3, **kwargs)
    return [y, *torch.autograd.grad(y, (x, gamma, beta), dy), mean, variance]


def orders(shape):
    return ["contiguous", "sliced", *(["channels_last"] if len(shape) > 3 else [])]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "order"), [(shape, order) for shape in SHAPES for order in orders(shape)], ids=str)
def test_equals_pytorch(shape, order, dtype, training):
    given = tensors(shape, dtype, order)
    close(step(bt.batch_norm, *given, training=training)[0], step(F.batch_norm, *given, training=training)[0])
    # PyTorch's gradient of channels_last halves is off by percents: it is compared in float64.
    wide = [t.double() for t in given]
    results = step(bt.batch_norm, *given, training=training), step(F.batch_norm, *wide, training=training)
    for ours, right in zip(*results, strict=True):
        close(ours.double(), right, {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-5}.get(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters_and_statistics(dtype):
    given = [t.to(dtype) for t in tensors((4, 6, 5, 7))]
    ours, theirs = step(bt.batch_norm, *given), step(F.batch_norm, *given)
    assert [t.dtype for t in ours] == [dtype] * 6
    close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_has_the_bits_of_the_numpy_functions(need, order, dtype):
    need("ml_dtypes")
    x, dy, gamma, beta, mean, variance = tensors((4, 6, 5, 7), dtype, order)
    y, dx, dgamma, dbeta, new_mean, new_variance = step(bt.batch_norm, x, dy, gamma, beta, mean, variance)
    back = (0, 2, 3, 1) if order == "channels_last" else (0, 1, 2, 3)
    x, dy, y, dx = (t.detach().permute(back) for t in (x, dy, y, dx))
    axis = back.index(1)
    wanted = bnfast.batch_norm_train(
        x, gamma, beta, mean.numpy(), variance.numpy(), axis=axis, momentum=1 - 0.3, epsilon=1e-3, correction=1
    )
    gradients = bnfast.batch_norm_grad(dy, x, wanted.mean, wanted.invstd, gamma, beta, axis=axis)
    for ours, numpys in ((y, wanted.y), (dx, gradients.dx)):
        assert ours.contiguous().view(torch.uint8).numpy().tobytes() == np.ascontiguousarray(numpys).tobytes()
    for ours, numpys in (
        (dgamma, gradients.dgamma),
        (dbeta, gradients.dbeta),
        (new_mean, mean),
        (new_variance, variance),
    ):
        assert ours.numpy().tobytes() == np.asarray(numpys).tobytes()


def test_tensors_are_read_and_written_where_they_lie():
    x, _, gamma, beta, mean, variance = tensors((4, 6, 8, 8), torch.float32, "channels_last")
    pointers = [t.data_ptr() for t in (mean, variance)]
    before = bnfast.build_info()["memory"]["fresh"] + bnfast.build_info()["memory"]["reused"]
    y = bt.batch_norm(x, mean, variance, gamma, beta, True)
    after = bnfast.build_info()["memory"]["fresh"] + bnfast.build_info()["memory"]["reused"]
    assert y.stride() == x.stride()
    assert [t.data_ptr() for t in (mean, variance)] == pointers
    assert after - before <= 2, "the statistics alone come from bnfast's pool"


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu", "silu", "gelu", "mish", "elu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_activation_and_residual(activation, with_residual):
    from bnfast.torch.reference import activate

    given = tensors((4, 3, 5))
    residual = torch.randn(4, 3, 5, dtype=torch.float64).requires_grad_() if with_residual else None

    def in_steps(*args, **_):
        y = F.batch_norm(*args)
        return activate(y if residual is None else y + residual, activation)

    for training in (True, False):
        ours = step(bt.batch_norm, *given, training=training, activation=activation, residual=residual)
        close(ours, step(in_steps, *given, training=training), 1e-8)
    for wrong in ({"activation": "swoosh"}, {"residual": torch.zeros(2)}, {"residual": torch.zeros(4, 3, 5)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            step(bt.batch_norm, *given, **wrong)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_order_numerically(training, activation):
    x, _, gamma, beta, mean, variance = tensors((3, 2, 4))
    residual = torch.randn_like(x)

    def function(x, gamma, beta, *residual):
        kwargs = {"residual": residual[0] if residual else None, "activation": activation}
        return bt.batch_norm(x, mean.clone(), variance.clone(), gamma, beta, training, **kwargs)

    for inputs in ((x, gamma, beta), (x, gamma, beta, residual)):
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def composed(x, mean, variance, gamma, beta, training, momentum, eps):
    """The formula. PyTorch's own third derivative takes the statistics as constants, which they aren't."""
    centered = x - x.mean((0, 2), keepdim=True)
    invstd = (centered.square().mean((0, 2), keepdim=True) + eps).rsqrt()
    return centered * invstd * gamma[:, None] + beta[:, None]


def test_third_order():
    def third(function):
        x, dy, gamma, beta, mean, variance = tensors((5, 2, 3))
        x, gamma = x.requires_grad_(), gamma.requires_grad_()
        y = function(x, mean, variance, gamma, beta, True, 0.1, 1e-3)
        (one,) = torch.autograd.grad((y * dy).sum(), x, create_graph=True)
        (two,) = torch.autograd.grad(one.square().sum(), x, create_graph=True)
        return torch.autograd.grad(two.square().sum(), (x, gamma))

    close(third(bt.batch_norm), third(composed), 1e-9)


def test_a_gradient_whose_dy_depends_on_x():
    def penalty(function):
        x, _, gamma, beta, mean, variance = tensors((5, 3))
        x = x.requires_grad_()
        y = function(x, mean, variance, gamma, beta, True, 0.1, 1e-3)
        (gradient,) = torch.autograd.grad((y.square() * x.sin()).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)

    close(penalty(bt.batch_norm), penalty(F.batch_norm), 1e-8)


@pytest.mark.parametrize("wanted", ["x", "gamma", "beta", "none", "no parameters", "gamma alone"])
def test_gradients_that_nobody_wants(wanted):
    def run(function):
        x, dy, gamma, beta, mean, variance = tensors((4, 3, 5))
        gamma = None if wanted == "no parameters" else gamma
        beta = None if wanted in ("no parameters", "gamma alone") else beta
        leaves = {"x": [x], "gamma": [gamma], "beta": [beta], "none": []}.get(wanted, [x])
        for leaf in leaves:
            leaf.requires_grad_()
        y = function(x, mean, variance, gamma, beta, True)
        assert y.requires_grad == bool(leaves)
        return [y, mean, variance, *(torch.autograd.grad(y, leaves, dy) if leaves else ())]

    close(run(bt.batch_norm), run(F.batch_norm))


def test_gradients_of_odd_layouts():
    """The gradient of a sum is expanded, that of a transpose is not in the order of x."""
    for make in (lambda y: y.sum(), lambda y: (y.transpose(1, 3) ** 2).sum(), lambda y: y[..., ::2].square().sum()):
        for order in ("contiguous", "channels_last", "sliced"):

            def run(function, order=order, make=make):
                x, _, gamma, beta, mean, variance = tensors((4, 3, 5, 6), order=order)
                x, gamma = x.requires_grad_(), gamma.requires_grad_()
                make(function(x, mean, variance, gamma, beta, True)).backward()
                return x.grad.contiguous(), gamma.grad

            close(run(bt.batch_norm), run(F.batch_norm))


def test_expanded_channels():
    """Their stride is 0, which PyTorch takes for no channels_last."""
    x, _, gamma, beta, *_ = tensors((2, 4, 3, 3))
    x = x[:, :1].expand(2, 4, 3, 3)
    close(bt.batch_norm(x, None, None, gamma, beta, True), F.batch_norm(x, None, None, gamma, beta, True))


def test_negated_views_are_read_with_their_sign():
    x, dy, gamma, beta, mean, variance = tensors((4, 3))
    y = bt.batch_norm(torch._neg_view(x), mean, variance, gamma, beta, False)
    close(y, F.batch_norm(-x, mean, variance, gamma, beta, False))
    x = x.requires_grad_()
    y = bt.batch_norm(x, None, None, gamma, beta, True)
    z = F.batch_norm(x, None, None, gamma, beta, True)
    close(torch.autograd.grad(y, x, torch._neg_view(dy)), torch.autograd.grad(z, x, -dy))


# ---- PyTorch's own samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opinfo_samples(dtype):
    for sample in op_samples("batch_norm", dtype):
        results = []
        for function in (bt.batch_norm, F.batch_norm):
            x, *args = (copied(a) for a in (sample.input, *sample.args))

            def run(function=function, x=x, args=args, sample=sample):
                y = function(x, *args, **sample.kwargs)
                leaves = [t for t in (x, *args[2:]) if t is not None]
                # PyTorch wants moving statistics without gradients, which the samples have.
                if y.dtype.itemsize == 2:  # dy, made of rounded values, differs too much to compare gradients
                    return y
                gradients = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
                return [y, *gradients, *(None if a is None else a.detach() for a in args[:2])]

            results.append(outcome(run))
        if isinstance(results[1], tuple):
            assert results[0] == results[1]
        else:
            close(*results)


def test_opinfo_samples_second_order():
    for sample in op_samples("batch_norm", torch.float64):
        if sample.input.numel() == 0:
            continue
        fixed = [copied(a) for a in sample.args[:2]]
        leaves = [copied(a) for a in (sample.input, *sample.args[2:]) if a is not None]

        def run(x, *parameters, fixed=fixed, sample=sample):
            moving = [None if a is None else a.detach().clone() for a in fixed]
            return bt.batch_norm(x, *moving, *parameters, **sample.kwargs)

        if isinstance(outcome(lambda run=run, leaves=leaves: run(*leaves)), torch.Tensor):
            assert torch.autograd.gradcheck(run, leaves)
            assert torch.autograd.gradgradcheck(run, leaves)


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
    assert count > 5


# ---- modules ---------------------------------------------------------------------------------------------------------


def pair(name="BatchNorm2d", *args, **kwargs):
    args = args or (6,)
    return getattr(bt, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)


@pytest.mark.parametrize(
    "kwargs", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"momentum": 1.0}]
)
def test_training_steps_and_inference(kwargs):
    results = []
    for module in pair(**kwargs):
        optimizer = torch.optim.SGD(module.parameters(), 0.1) if list(module.parameters()) else None
        torch.manual_seed(0)
        for _ in range(4):
            y = module(torch.randn(4, 6, 5, 5) * 3 + 1)
            if optimizer:
                y.pow(3).mean().backward()
                optimizer.step()
        module.eval()
        results.append([module(torch.randn(2, 6, 3, 3)), *module.state_dict().values()])
    close(*results)
    assert bnfast.torch.report(pair(**kwargs)[0]).rows[0].state == "bnfast"


@pytest.mark.parametrize("name", MODULES)
def test_errors_are_pytorchs(name):
    rank = {"BatchNorm1d": 2, "BatchNorm2d": 4, "BatchNorm3d": 5}[name]
    for shape in [(2,), (2, 5, *[3] * (rank - 2)), (1, 6, *[1] * (rank - 2)), (2, 6, 1, 1, 1, 1)]:
        results = [outcome(lambda module=module, shape=shape: module(torch.zeros(shape))) for module in pair(name)]
        assert results[0] == results[1]
        assert isinstance(results[0], tuple), shape
    results = [
        outcome(lambda module=module: module(torch.zeros(4, 6, *[2] * (rank - 2), dtype=torch.float64)))
        for module in pair(name)
    ]
    assert results[0] == results[1]
    assert isinstance(results[0], tuple)


@pytest.mark.parametrize(
    ("given", "training"), [("mean", True), ("variance", True), ("mean", False), ("variance", False), ("none", False)]
)
def test_missing_statistics_are_as_in_pytorch(given, training):
    x, _, _, _, mean, variance = tensors((4, 3))
    moving = [mean if given == "mean" else None, variance if given == "variance" else None]
    results = [outcome(lambda f=f: f(x, *moving, training=training)) for f in (bt.batch_norm, F.batch_norm)]
    assert results[0] == results[1]
    assert isinstance(results[0], tuple)


@pytest.mark.parametrize("kwargs", [{"eps": 0}, {"eps": -1.0}, {"momentum": 1.5}, {"momentum": -0.5}])
def test_odd_settings_are_as_in_pytorch(kwargs):
    for training in (True, False):
        results = []
        for module in pair(**kwargs):
            torch.manual_seed(0)
            module.train(training)
            results.append(outcome(lambda module=module: module(torch.randn(4, 6, 5, 5))))
        if isinstance(results[1], tuple):
            assert results[0] == results[1]
        else:
            close(*results)


def test_an_empty_batch_changes_nothing():
    for module in pair():
        x = torch.zeros(0, 6, 2, 2, requires_grad=True)
        y = module(x)
        y.sum().backward()
        assert y.shape == x.shape
        assert not module.running_mean.any()
        assert module.num_batches_tracked == 1
        assert not module.weight.grad.any()
    assert pair()[0]._bnfast_reason == ""


def test_a_variance_and_epsilon_of_0_have_no_gradient_in_inference():
    """y is the bias there, whatever x is. The second channel is an ordinary one."""
    module = bt.BatchNorm1d(2, eps=0.0).eval()
    module.running_var.copy_(torch.tensor([0.0, 4.0]))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    y = module(x)
    assert y.tolist() == [[0, 1], [0, 2]]
    y.sum().backward()
    assert x.grad.tolist() == [[0, 0.5], [0, 0.5]]
    assert module.weight.grad.tolist() == [0, 3]
    assert module.bias.grad.tolist() == [2, 2]


def test_a_module_that_counts_no_batches():
    for module, theirs in (pair(), pair(momentum=None)):
        module.num_batches_tracked = theirs.num_batches_tracked = None
        x = torch.randn(4, 6, 3, 3)
        close([module(x), *module.state_dict().values()], [theirs(x), *theirs.state_dict().values()])


def test_one_value_per_channel_is_an_error_that_changes_no_statistics():
    module = bt.BatchNorm1d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.ones(1, 3))
    assert not module.running_mean.any()
    assert module.eval()(torch.ones(1, 3)).shape == (1, 3)


def test_isinstance_state_dict_pickle_and_copies():
    ours, theirs = pair()
    assert isinstance(ours, torch.nn.BatchNorm2d)
    ours(torch.randn(4, 6, 3, 3))
    theirs.load_state_dict(ours.state_dict())
    close([*theirs.state_dict().values()], [*ours.state_dict().values()])
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(made) is bt.BatchNorm2d
        x = torch.randn(4, 6, 3, 3)
        close(made.eval()(x), theirs.eval()(x))
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    assert type(torch.load(stream, weights_only=False)) is bt.BatchNorm2d


def test_hooks_see_what_they_see_in_pytorch():
    seen = []
    for module in pair():
        calls = []
        module.register_forward_pre_hook(lambda m, args, calls=calls: calls.append(("pre", args[0].shape)))
        module.register_forward_hook(lambda m, args, y, calls=calls: calls.append(("hook", y.sum().round())) or y * 2)
        module.register_full_backward_hook(lambda m, dx, dy, calls=calls: calls.append(("back", dx[0].shape)))
        torch.manual_seed(0)
        module(torch.randn(4, 6, 3, 3, requires_grad=True)).square().sum().backward()
        seen.append((calls, module.weight.grad))
    assert [c[0] for c in seen[0][0]] == ["pre", "hook", "back"]
    close(seen[0][1], seen[1][1])


def test_parametrized_and_weight_normed_parameters_are_used():
    from torch.nn.utils import parametrize

    class Double(torch.nn.Module):
        def forward(self, w):
            return 2 * w

    results = []
    for module in pair():
        parametrize.register_parametrization(module, "weight", Double())
        torch.manual_seed(0)
        results.append(module(torch.randn(4, 6, 3, 3)))
    close(*results)


def test_autocast_and_half_models():
    for module in (pair()[0], pair()[0].to(torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(torch.randn(4, 6, 3, 3).to(torch.bfloat16))
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert module._bnfast_reason == ""
    results = []
    for module in pair():
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), module)
        torch.manual_seed(0)
        model[0].weight.data.normal_(), model[0].bias.data.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            results.append(model(torch.randn(4, 3, 5, 5)))
    close(*results)


def test_what_the_kernels_do_not_take_is_left_to_pytorch():
    import torch.autograd.forward_ad as forward_ad
    from torch.func import functional_call, grad, vmap

    module, theirs = pair()
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(4, 6, 3, 3)
    state = [dict(m.eval().named_parameters()) for m in (module, theirs)]
    gradients = [
        grad(lambda s, m=m: functional_call(m, s, (x,)).square().sum())(s)
        for m, s in zip((module, theirs), state, strict=True)
    ]
    close([*gradients[0].values()], [*gradients[1].values()])
    assert "torch.func" in module._bnfast_reason
    close(vmap(module)(x[None]), vmap(theirs)(x[None]))
    with forward_ad.dual_level():
        for one in (module, theirs):
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            tangent = forward_ad.unpack_dual(one(dual)).tangent
            state.append(tangent)
    close(*state[2:])
    assert "forward-mode" in module._bnfast_reason
    with torch.device("meta"):
        assert bt.BatchNorm2d(6)(torch.empty(2, 6, 3, 3)).device.type == "meta"
    traced = torch.jit.trace(module, x)
    close(traced(x), theirs(x))
    scripted = torch.jit.script(bt.BatchNorm2d(6).eval())
    close(scripted(x), theirs(x))
    assert [node.op for node in torch.fx.symbolic_trace(torch.nn.Sequential(module)).graph.nodes] == [
        "placeholder",
        "call_module",
        "output",
    ]


def test_other_classes_and_layouts_of_tensors():
    class Own(torch.Tensor):
        pass

    x = torch.randn(4, 6, 3, 3)
    module, theirs = pair()
    made = module(x.as_subclass(Own))
    assert type(made) is Own
    close(made.as_subclass(torch.Tensor), theirs(x))
    assert module._bnfast_reason == "the input is a Own"
    for training in (True, False):
        results = [one.train(training)(x.to_mkldnn()).to_dense() for one in (module, theirs)]
        close(*results)
    assert module._bnfast_reason == "the input is nested or has layout torch._mkldnn"


def test_default_device_and_inference_mode():
    module = bt.BatchNorm2d(6)
    torch.set_default_device("meta")
    try:
        y = module(torch.randn(4, 6, 3, 3, device="cpu"))
    finally:
        torch.set_default_device(None)
    assert y.device.type == "cpu"
    with torch.inference_mode():
        assert module.eval()(torch.randn(2, 6, 2, 2)).is_inference()


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    results = []
    for module in pair():
        torch.manual_seed(0)
        x = torch.randn(4, 6, 3, 3, requires_grad=True)
        checkpoint(module, x, use_reentrant=False).square().sum().backward()
        results.append([x.grad, module.weight.grad, module.running_mean])
    close(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("epilogue", ["none", "relu", "silu", "residual", "residual and relu", "residual and silu"])
def test_many_gradients_at_once(epilogue, training):
    """jacobian(vectorize=True), gradcheck(check_batched_grad=True)."""
    *with_residual, activation = [word for word in epilogue.split(" and ") if word != "none"] or [None]
    if activation == "residual":
        with_residual, activation = ["residual"], None
    x, residual = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    gamma, beta, mean = torch.randn(3, 3, dtype=torch.float64).unbind()
    given = [x, gamma, beta, *([residual] if with_residual else [])]

    def call(x, gamma, beta, residual=None):
        statistics = mean.clone(), torch.ones_like(mean)
        return bt.batch_norm(x, *statistics, gamma, beta, training, activation=activation, residual=residual)

    at_once, in_turn = (
        torch.autograd.functional.jacobian(call, tuple(given), vectorize=vectorize) for vectorize in (True, False)
    )
    close(at_once, in_turn, 1e-12)


def flags_of(address):
    """What the system knows of the memory there: "hg" if huge pages were asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            begin, end = (int(part, 16) for part in line.split(" ")[0].split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here")
def test_large_outputs_ask_for_huge_pages():
    for size, asks in ((3000, True), (1000, False)):
        x = torch.randn(1, 1, size, size, requires_grad=True)
        y = bt.batch_norm(x, None, None, training=True)
        y.backward(torch.ones_like(y))
        assert ["hg" in flags_of(t.data_ptr() + 4096 * 600) for t in (y, x.grad)] == [asks, asks]
