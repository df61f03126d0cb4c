"""The program that each rank of test_mpi.py runs: mpirun -n SIZE python mpi_ranks.py SIZE FOLDER.

A case is a whole batch and its division into shards; test_mpi.py creates the same case. Each rank writes its results to
FOLDER/RANK.pickle.
"""

import pickle
import sys
from pathlib import Path

import bnfast
import numpy as np

EPSILON = 1e-3
CASES = {  # name: shape, axis, dtype, options of train and grad
    "channels_last": ((37, 5, 3, 6), -1, "float32", {"activation": "relu"}),
    "channels_first": ((23, 7, 9), 1, "float32", {"activation": "leaky_relu", "residual": True}),
    "offset": ((301, 4), 1, "float32", {"offset": 1e4}),
    "float64": ((64, 5), 1, "float64", {"residual": True}),
    "float16": ((40, 8, 3), -1, "float16", {"activation": "relu6"}),
    "masked": ((33, 5), 1, "float32", {"mask": True}),
    "infinite_dy": ((24, 3), 1, "float32", {"infinite": True}),
    "one_value": ((1, 3), 1, "float32", {}),
    "empty": ((0, 5), 1, "float32", {}),
}


def whole(name):
    """The whole batch of a case: a dict of x, dy, parameters and options."""
    shape, axis, dtype, wanted = CASES[name]
    rng = np.random.default_rng(sorted(CASES).index(name))
    channels = shape[axis]
    x = rng.standard_normal(shape) * rng.uniform(0.5, 2) + wanted.get("offset", rng.uniform(-1, 1))
    param = "float64" if dtype == "float64" else "float32"
    case = {"x": x.astype(dtype), "dy": rng.standard_normal(shape).astype(dtype), "axis": axis}
    if wanted.get("infinite"):
        case["dy"][1, 0] = np.inf
    case["gamma"] = rng.uniform(-2, 2, channels).astype(param)
    case["beta"] = rng.uniform(-1, 1, channels).astype(param)
    case["activation"] = wanted.get("activation")
    case["residual"] = rng.standard_normal(shape).astype(dtype) if wanted.get("residual") else None
    case["mask"] = rng.uniform(0, 2, (len(x), 1)).astype("float32") if wanted.get("mask") else None
    if wanted.get("mask"):
        case["mask"][: len(x) // 4] = 0  # all samples of the first of four ranks
    case["moving"] = rng.uniform(-1, 1, channels).astype(param), rng.uniform(0.5, 2, channels).astype(param)
    return case


def cuts(samples, size, uneven):
    """(begin, end) of each rank's samples: about equal parts, or most on the last rank and none on the one before."""
    ends = [samples * (rank + 1) // size for rank in range(size)]
    if uneven:
        ends = [min(rank, samples) for rank in range(size - 1)] + [samples]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def shard(case, begin, end):
    parts = {name: case[name] for name in ("x", "dy", "residual", "mask")}
    parts = {name: None if a is None else a[begin:end].copy() for name, a in parts.items()}
    return {**case, **parts, "moving": tuple(a.copy() for a in case["moving"])}


def run(package, case, **comm):
    """All results of `package` (bnfast or bnfast.distributed.mpi) for a case."""
    common = {"axis": case["axis"], "activation": case["activation"], "residual": case["residual"], **comm}
    parameters = case["gamma"], case["beta"]
    moments = package.moments(case["x"], axis=case["axis"], mask=case["mask"], **comm)
    train = package.batch_norm_train(
        case["x"],
        *parameters,
        *case["moving"],
        momentum=0.9,
        epsilon=EPSILON,
        correction=1,
        mask=case["mask"],
        **common,
    )
    statistics = train.mean, train.invstd
    grad = package.batch_norm_grad(case["dy"], case["x"], *statistics, *parameters, mask=case["mask"], **common)
    frozen = package.batch_norm_grad(case["dy"], case["x"], *statistics, training=False, **common)
    by_y = package.batch_norm_grad(
        case["dy"],
        case["x"],
        *statistics,
        *parameters,
        mask=case["mask"],
        **common | {"residual": None, "y": train.y},
    )
    named = [("moments", moments), ("train", train), ("grad", grad), ("frozen", frozen), ("by_y", by_y)]
    results = {f"{call}.{name}": a for call, result in named for name, a in result._asdict().items()}
    return results | dict(zip(("moving_mean", "moving_variance"), case["moving"], strict=True))


def outcome(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def errors(mpi, comm):
    """The error text of each bad call on this rank, and the moving statistics that were passed to all of them."""
    first = comm.rank == 0
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    moving = np.zeros(3, np.float32), np.ones(3, np.float32)
    bad = np.full((4, 3), np.inf, np.float32) if first else x
    wide = np.ones((2, 3, 4 if first else 1), np.float32)
    statistics = np.zeros(wide.shape[1:]), np.ones(wide.shape[1:])
    results = {
        "gamma": outcome(mpi.batch_norm_train, x, np.ones(3 - first, np.float32), None, *moving),
        "grad": outcome(mpi.batch_norm_grad, x, x, np.zeros(3), np.ones(3), axis=1 + first),
        "channels": outcome(mpi.batch_norm_train, x[:, : 2 + first], None, None),
        "extents": outcome(mpi.batch_norm_grad, wide, wide, *statistics, axis=(1, 2)),
        "nan_policy": outcome(mpi.batch_norm_train, bad, None, None, *moving, nan_policy="raise"),
        "comm": outcome(mpi.moments, x, comm=comm.rank),
    }
    mpi.batch_norm_train(bad, None, None, *moving, nan_policy="skip_update")
    results["moving"] = moving
    results["count after"] = mpi.moments(x).count
    return results


def in_place(mpi, case):
    """out= is x in the forward call and dy in the backward call; without gamma, dgamma has the dtype of x."""
    x, dy = case["x"].copy(), case["dy"].copy()
    train = mpi.batch_norm_train(x, axis=case["axis"], out=x)
    grad = mpi.batch_norm_grad(dy, case["x"], train.mean, train.invstd, axis=case["axis"], out=dy)
    return {"y": x, "dx": dy, "same": train.y is x and grad.dx is dy, "dgamma": grad.dgamma}


def main(size, folder):
    from bnfast.distributed import mpi
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    assert comm.size == size, f"mpirun and mpi4py are of different MPIs: {comm.size} ranks instead of {size}"
    bnfast.set_num_threads(1)
    results = {}
    for name in CASES:
        case = whole(name)
        for uneven in (False, True):
            begin, end = cuts(len(case["x"]), size, uneven)[comm.rank]
            results[name, uneven] = run(mpi, shard(case, begin, end))
        results[name, "self"] = run(mpi, shard(case, 0, None), comm=MPI.COMM_SELF)
    case = whole("channels_last")
    halves = comm.Split(comm.rank % 2)
    begin, end = cuts(len(case["x"]), size, False)[comm.rank]
    results["halves"] = run(mpi, shard(case, begin, end), comm=halves)
    results["in_place"] = in_place(mpi, shard(case, begin, end))
    results["errors"] = errors(mpi, comm)
    (Path(folder) / f"{comm.rank}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
