"""bnfast.torch.fold: what is merged, what isn't, and that outputs stay."""

import bnfast.torch as bt
import pytest
import torch
from torch import nn
from torch_samples import close


def trained(model, x):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    model.double().train()
    for _ in range(3):
        model(x)
    return model.eval()


def identities(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Identity)]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)
        self.b, self.nb = nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.c, self.nc = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)  # read twice
        self.d = nn.Conv2d(6, 6, 1)  # called twice
        self.nd = nn.BatchNorm2d(6)
        self.before = nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.c(self.nb(self.b(self.na(self.a(x)))))
        y = self.nc(y) + y
        y = self.nd(self.d(self.d(y)))
        return self.before(torch.relu(y))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice = self.again = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        x = self.body(x) if x.sum() > -1e30 else x
        return self.twice(self.again(self.norm(self.conv(x))))


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    ("make", "merged"),
    [
        (Branches, ["na"]),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)), ["1"]),
        (Untraceable, ["body.1"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), []),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), ["1"]),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False), nn.BatchNorm1d(5)), ["2"]),
        # a Linear makes the last axis, these read another one
        (lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 5), nn.BatchNorm1d(3)), []),
        (lambda: nn.Sequential(nn.Linear(8, 5), nn.BatchNorm2d(3)), []),
    ],
)
def test_fold(make, merged, accelerated):
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model = trained(make(), x)
    if accelerated:
        bt.accelerate(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = bt.fold(model, x) if make is Untraceable else bt.fold(model)
    assert identities(folded) == merged
    close(folded(x), model(x), 1e-9)
    assert type(folded) is type(model)
    assert identities(model) == []
    close([*model.state_dict().values()], [*before.values()])


class Inside(nn.Module):
    """Depends on values, and calls a part of a Sequential, all of another, and one that no example reaches."""

    def __init__(self):
        super().__init__()
        self.part, self.all, self.rare = (
            nn.Sequential(nn.Conv2d(n, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)) for n in (3, 4, 4)
        )

    def forward(self, x, scale=1):
        x = self.all(self.part[0](x)) * scale
        return self.rare(x) if x.mean() > 1e9 else x


def test_a_model_that_cannot_be_traced():
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model = trained(Inside(), x)
    for part in (model.part, model.rare):
        part[1].running_mean.fill_(3)
    with pytest.warns(UserWarning, match=r"can't trace Inside, so its batch norms stay.*fold\(model, x\)") as warned:
        unfolded = bt.fold(model)
    assert warned[0].filename == __file__
    assert identities(unfolded) == []
    folded = bt.fold(model, (x, 2))
    assert identities(folded) == ["all.1"]
    close(folded(x, 2), model(x, 2), 1e-9)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in folded.modules())


def test_what_hooks_see_is_not_folded():
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    model[0].register_forward_hook(lambda module, args, y: y + 1)
    folded = bt.fold(model)
    assert identities(folded) == []
    close(folded(x), model(x))
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module. Received: int"):
        bt.fold(3)
