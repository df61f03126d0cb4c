"""Two processes with gloo: DistributedDataParallel, and SyncBatchNorm against one process with the whole batch."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
import bnfast.torch as bt

def model(kind):
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(),
                               torch.nn.Linear(4 * 16, 5), torch.nn.BatchNorm1d(5, momentum=None),
                               torch.nn.BatchNorm1d(5, affine=False, track_running_stats=False)).double()
    if kind == "sync":
        made = bt.SyncBatchNorm.convert_sync_batchnorm(made)
        assert type(made[1]) is bt.SyncBatchNorm
    return bt.accelerate(made) if kind != "torch" else made

def batches():
    torch.manual_seed(1)
    return torch.randn(7, 3, 6, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)

def run(module, x, w):
    for _ in range(2):
        module.zero_grad()
        (module(x) * w).sum().backward()
    return [p.grad for p in module.parameters()] + [b.double() for b in module.buffers()]

def worker(rank, path, cuts):
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    x, w = batches()
    part = slice(0, cuts) if rank == 0 else slice(cuts, None)
    sync = model("sync")
    results = run(sync, x[part], w[part])
    for p in sync.parameters():
        dist.all_reduce(p.grad)
    right = run(model("torch"), x, w)
    for ours, theirs in zip(results, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    mine = torch.cat([b.double().flatten() for b in sync.buffers()])
    others = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(others, mine)
    assert torch.equal(*others), "the same bits in all processes"
    for kind in ("torch", "ours"):  # each process has its own statistics; buffers are those of rank 0
        ddp = torch.nn.parallel.DistributedDataParallel(model(kind))
        results = run(ddp, x[:3] if rank == 0 else x[3:], w[:3] if rank == 0 else w[3:])
        if kind == "torch":
            wanted = results
    for ours, theirs in zip(results, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    try:
        y = sync(x[part])
        torch.autograd.grad(y.sum(), sync[0].weight, create_graph=True)
    except RuntimeError as error:
        assert "second derivatives" in str(error)
    else:
        raise AssertionError("second derivatives must be an error")
    dist.destroy_process_group()
    # DistributedDataParallel keeps gloo's threads alive, and one that drops a tensor while Python ends aborts.
    os._exit(0)

if __name__ == "__main__":
    mp.spawn(worker, (sys.argv[1], int(sys.argv[2])), nprocs=2)
    print("equal")
"""


@pytest.mark.serial
@pytest.mark.parametrize("cuts", [0, 1])  # the samples of the first process
def test_two_processes(tmp_path, cuts):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, str(tmp_path / "store"), str(cuts)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout.endswith("equal\n"), result.stderr[-3000:]  # older gloos print, too


def test_without_a_process_group_it_is_batch_norm():
    import bnfast.torch as bt
    import torch

    x = torch.randn(4, 3, 5, 5)
    sync, plain = bt.SyncBatchNorm(3), torch.nn.BatchNorm2d(3)
    torch.testing.assert_close(sync(x), plain(x))
    torch.testing.assert_close(sync.running_var, plain.running_var)
    torch.testing.assert_close(sync.eval()(x), plain.eval()(x))
    with pytest.raises(ValueError, match="expected at least 2D"):
        sync(x[0, 0, 0])
    assert type(bt.accelerate(torch.nn.SyncBatchNorm(3))) is bt.SyncBatchNorm
    assert type(bt.to_torch(bt.SyncBatchNorm(3))) is torch.nn.SyncBatchNorm


def test_what_several_processes_cannot_merge_is_an_error(monkeypatch):
    import bnfast.torch as bt
    import torch

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    module = bt.SyncBatchNorm(3)
    text = r"input must be a plain float tensor beside parameters of its dtype. Received: "
    with pytest.raises(TypeError, match=text + r"parameters have torch.float32 for an input of torch.float64"):
        module(torch.ones(4, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match=text + r"the input has dtype torch.int32"):
        module(torch.ones(4, 3, dtype=torch.int32))
    assert not module.running_mean.any()


def test_on_another_device_and_without_momentum_it_is_pytorchs():
    import bnfast.torch as bt
    import torch

    assert bt.SyncBatchNorm(3, device="meta")(torch.empty(4, 3, device="meta")).device.type == "meta"
    torch.manual_seed(0)
    sync, plain = bt.SyncBatchNorm(3, momentum=None), torch.nn.BatchNorm1d(3, momentum=None)
    for _ in range(3):
        x = torch.randn(4, 3)
        torch.testing.assert_close(sync(x), plain(x))
    torch.testing.assert_close(dict(sync.state_dict()), dict(plain.state_dict()))
