"""One SHA-256 per family of results, over a fixed set of configurations: equal before and after a change that must not
change a bit. A program, not a test:

    python tests/helpers/fingerprint.py [--keras]

Without --keras: 500 configurations of the NumPy functions. With it: the Keras layer in a graph, forward, gradients and
moving statistics, with the bridge that BNFAST_BRIDGE names. Uses only public names, so that it runs on older versions.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import bnfast
import numpy as np

CONFIGURATIONS = 500


def digest(values: Any) -> bytes:
    """The bytes of arrays, every NaN the same; nested tuples are flattened, None has a mark of its own."""
    if values is None:
        return b"none"
    if isinstance(values, tuple | list):
        return b"".join(map(digest, values))
    array = np.ascontiguousarray(values)
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        bits = array.view(f"u{array.itemsize}")
        array = np.where(np.isnan(array.astype(np.float64)), bits.dtype.type(-1 % 2 ** (8 * array.itemsize)), bits)
    return str((array.shape, array.dtype)).encode() + array.tobytes()


def dtype_of(rng: np.random.Generator) -> np.dtype[Any]:
    name = rng.choice(["float32", "float32", "float64", "float16", "bfloat16"])
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def batch_norm(rng: np.random.Generator) -> Any:
    """train, infer, grad and moments of one random configuration."""
    rank = int(rng.integers(1, 6))
    shape = tuple(int(n) for n in rng.choice([1, 2, 3, 5, 8, 17, 33], rank))
    if rng.random() < 0.3:  # large enough for several chunks and threads
        shape = (int(rng.choice([64, 301, 1024])), int(rng.choice([3, 64, 130])), int(rng.choice([1, 7, 49, 196])))
    axis, dtype = int(rng.integers(-len(shape), len(shape))), dtype_of(rng)
    channels, parameter = shape[axis], np.float64 if dtype == np.float64 else np.float32
    x, dy, residual = ((rng.normal(0.5, 2, shape) + rng.choice([0, 0, 100])).astype(dtype) for _ in range(3))
    gamma, beta, mean = (rng.normal(size=channels).astype(parameter) for _ in range(3))
    variance = rng.uniform(0.5, 2, channels).astype(parameter)
    options = {"axis": axis, "activation": rng.choice([None, "relu", "relu6", "leaky_relu"])}
    given = {**options, "residual": residual if rng.random() < 0.4 else None}
    kept = [n for i, n in enumerate(shape) if i != axis % len(shape)]
    mask = rng.uniform(0, 1, kept) * (rng.random(kept) < 0.8) if rng.random() < 0.3 else None
    forward = bnfast.batch_norm_train(
        *(x, gamma, beta, mean, variance), momentum=0.9, mask=mask, correction=int(rng.integers(2)), **given
    )
    backward = bnfast.batch_norm_grad(dy, x, forward.mean, forward.invstd, gamma, beta, mask=mask, **given)
    frozen = bnfast.batch_norm_grad(dy, x, forward.mean, forward.invstd, gamma, beta, training=False, **given)
    inferred = bnfast.batch_norm_infer(x, mean, variance, gamma, beta, **given)
    return forward, mean, variance, backward, frozen, inferred, bnfast.moments(x, axis=axis, mask=mask)


def group_norm(rng: np.random.Generator) -> Any:
    """A group norm and a layer norm with their gradients."""
    groups, per_group = int(rng.choice([1, 2, 3, 8])), int(rng.choice([1, 2, 5, 16]))
    shape = (int(rng.choice([1, 3, 16])), groups * per_group, int(rng.choice([1, 6, 49, 300])))
    dtype = dtype_of(rng)
    x, dy = (rng.normal(1, 2, shape).astype(dtype) for _ in range(2))
    parameter = np.float64 if dtype == np.float64 else np.float32
    gamma, beta = (rng.normal(size=shape[1]).astype(parameter) for _ in range(2))
    forward = bnfast.group_norm(x, groups, gamma, beta, axis=1)
    backward = bnfast.group_norm_grad(dy, x, forward.mean, forward.invstd, groups, gamma, axis=1)
    weight = rng.normal(size=shape[2]).astype(parameter)
    layer = bnfast.layer_norm(x, weight, None)
    return forward, backward, layer, bnfast.layer_norm_grad(dy, x, layer.mean, layer.invstd, weight)


def second_order(rng: np.random.Generator) -> Any:
    """batch_norm_grad_grad and weight_norm."""
    shape = (int(rng.choice([4, 33])), int(rng.choice([3, 16])))
    x, dy, ddx = (rng.normal(1, 2, shape) for _ in range(3))
    ddgamma, ddbeta, gamma = (rng.normal(size=shape[1]) for _ in range(3))
    mean, variance = x.mean(0), x.var(0)
    invstd = 1 / np.sqrt(variance + 1e-3)
    doubled = bnfast.batch_norm_grad_grad(ddx, dy, x, mean, invstd, gamma, ddgamma=ddgamma, ddbeta=ddbeta)
    return tuple(doubled), tuple(bnfast.weight_norm_grad(dy, x, gamma))


FAMILIES = {"batch_norm": batch_norm, "group_norm": group_norm, "second_order": second_order}


def numpy_results() -> Iterator[tuple[str, Any]]:
    names = ["batch_norm"] * 3 + ["group_norm", "second_order"]
    for i in range(CONFIGURATIONS):
        name = names[i % len(names)]
        yield name, FAMILIES[name](np.random.default_rng(i))


def keras_results() -> Iterator[tuple[str, Any]]:
    """The layer's features one by one, and pairs of them, with and without a mask."""
    import bnfast.keras
    import tensorflow as tf

    features: dict[str, dict[str, Any]] = {
        "plain": {},
        "relu": {"activation": "relu"},
        "average": {"momentum": None},
        "average, sample variance": {"momentum": None, "correction": 1, "nan_policy": "skip_update"},
        "renorm": {"renorm": True, "renorm_clipping": {"rmin": 0.5, "rmax": 2.0, "dmax": 1.0}},
        "renorm, average": {"renorm": True, "momentum": None},
        "ghosts": {"virtual_batch_size": 4},
        "ghosts, strided, average": {
            "virtual_batch_size": 4,
            "virtual_batch_grouping": "strided",
            "momentum": None,
        },
        "adjustment": {"adjustment": lambda shape: (tf.fill([shape[0], 1, 1], 1.25), tf.fill([1, 1, shape[2]], 0.5))},
        "frozen statistics": {"use_batch_statistics": False},
        "no updates": {"update_statistics": False},
        "several axes": {"axis": [1, 2]},
        "axis 1": {"axis": 1},
        "no affine": {"scale": False, "center": False},
    }
    for name, options in features.items():
        for dtype in ("float32", "float64", "mixed_float16"):
            for masked in (False, True):
                rng = np.random.default_rng(len(name))
                x = rng.normal(1, 2, (8, 5, 6))
                layer = bnfast.keras.BatchNormalization(dtype=dtype, **options)
                layer.build(x.shape)
                given = tf.constant(x, layer.compute_dtype)
                shape = (8,) if name == "several axes" else (8, 6) if name == "axis 1" else (8, 5)
                mask = tf.constant(rng.random(shape) < 0.7) if masked else None

                @tf.function
                def run(training: Any, layer: Any = layer, given: Any = given, mask: Any = mask) -> Any:
                    with tf.GradientTape() as tape:
                        tape.watch(given)
                        y = layer(given, training=training, mask=mask)
                        loss = tf.reduce_sum(tf.cast(y, tf.float32) ** 2)
                    return y, tape.gradient(loss, [given, *layer.trainable_variables])

                results = [run(True), run(tf.constant(True)), run(False)]
                arrays = [t.numpy() for t in tf.nest.flatten(results) if t is not None]
                yield name, [*arrays, *layer.get_weights()]


def main() -> None:
    results = keras_results() if "--keras" in sys.argv[1:] else numpy_results()
    hashes: dict[str, Any] = {}
    count = 0
    for name, values in results:
        hashes.setdefault(name, hashlib.sha256()).update(digest(values))
        count += 1
    for name, value in hashes.items():
        print(f"{name:28} {value.hexdigest()[:32]}")
    print(f"{count} configurations")


if __name__ == "__main__":
    main()
