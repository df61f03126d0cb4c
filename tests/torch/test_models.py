"""accelerate, to_torch and report."""

import copy

import bnfast.torch as bt
import pytest
import torch
from torch_samples import close


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
        self.shared = self.first[1]
        self.own = Own(4)
        self.lazy = torch.nn.LazyBatchNorm1d()
        self.assigned = torch.nn.BatchNorm1d(4)
        self.assigned.forward = lambda x: x

    def forward(self, x):
        return self.lazy(self.own(self.assigned(self.shared(self.first(x)))))


class Own(torch.nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + 1


def test_accelerate_changes_classes_alone():
    torch.manual_seed(0)
    theirs = Net()
    x = torch.randn(5, 2, 9)
    theirs(x)
    ours = copy.deepcopy(theirs)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    objects = dict(ours.named_modules())
    assert bt.accelerate(ours) is ours
    assert dict(ours.named_modules()) == objects
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in ours.parameters()}
    assert type(ours.shared) is bt.BatchNorm1d
    assert type(ours.own) is Own
    assert type(ours.lazy) is bt.BatchNorm1d
    for model in (ours, theirs):
        model.zero_grad()
        model(x).square().sum().backward()
    close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    close([*ours.state_dict().values()], [*theirs.state_dict().values()])
    assert {type(m) for m in bt.to_torch(ours).modules()} == {type(m) for m in theirs.modules()}


def test_report():
    model = Net()
    assert {row.name: row.reason for row in bt.report(bt.accelerate(model)).rows} == {
        "first.1": "",
        "own": f"{__name__}.Own is a class of its own: what it computes is unknown",
        "lazy": "it is lazy: call the model once, then accelerate it",
        "assigned": "its forward was assigned",
    }
    assert str(bt.report(model)).startswith("Net: 1 of 4 normalizations on bnfast\nmodule ")
    (row,) = bt.report(torch.nn.BatchNorm1d(3)).rows
    assert (row.name, row.state, row.reason) == ("", "torch", "accelerate() has not been applied")
    module = bt.BatchNorm1d(3)
    module(torch.empty(0, 3))
    assert bt.report(module).rows[0].reason == "left to PyTorch in its last such call: the input is empty"
    module(torch.randn(4, 3, 2).transpose(0, 1).transpose(0, 1)[..., ::2])
    assert bt.report(module).rows[0].reason == "", "a copy is no other kernel"


def test_a_replaced_forward_is_left(monkeypatch):
    monkeypatch.setattr(torch.nn.BatchNorm1d, "forward", lambda self, x: x, raising=False)
    (row,) = bt.report(bt.accelerate(torch.nn.BatchNorm1d(3))).rows
    assert row.reason == "BatchNorm1d.forward was replaced"


@pytest.mark.parametrize("function", [bt.accelerate, bt.to_torch, bt.report])
def test_what_is_no_module(function):
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module. Received: dict"):
        function({})
