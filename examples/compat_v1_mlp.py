"""A TensorFlow 1 program on TensorFlow 2: an MLP of seven layers with tf.layers.batch_normalization, run in a Session.

The moving statistics are updated only if the ops in UPDATE_OPS run. There are two ways: "by hand" passes them to
Session.run together with the train op; "control_dependencies" makes the train op depend on them. The result is the
same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common
import tensorflow as tf
from bnfast.compat.v1 import batch_normalization

v1 = tf.compat.v1
LAYERS, WIDTH, CLASSES = 7, 64, 10
UPDATES = ("by hand", "control_dependencies")


def build_model(images: Any, training: Any) -> Any:
    """The logits: six hidden layers with batch norm and leaky_relu, and a last layer without."""
    y = images
    for i in range(LAYERS):
        last = i == LAYERS - 1
        with v1.variable_scope(f"layer_{i}"):
            start = v1.glorot_uniform_initializer(seed=i)
            kernel = v1.get_variable("kernel", [y.shape[-1], CLASSES if last else WIDTH], initializer=start)
            y = tf.matmul(y, kernel)
            if not last:
                y = tf.nn.leaky_relu(batch_normalization(y, momentum=0.9, training=training))
    return y


def train(steps: int, update: str) -> float:
    """Train with one of UPDATES and return the test accuracy."""
    data = common.digits(flat=True)
    with tf.Graph().as_default(), v1.Session() as session:
        images, labels = v1.placeholder(tf.float32, [None, 64]), v1.placeholder(tf.int64, [None])
        training = v1.placeholder_with_default(False, [])  # False when the test accuracy is computed
        logits = build_model(images, training)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        accuracy = tf.reduce_mean(tf.cast(tf.equal(tf.argmax(logits, 1), labels), tf.float32))
        updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
        with tf.control_dependencies(updates if update == "control_dependencies" else []):
            train_op = v1.train.AdamOptimizer(2e-3).minimize(loss)
        fetches = [loss, train_op, updates] if update == "by hand" else [loss, train_op]
        session.run(v1.global_variables_initializer())
        for x, y in common.batches(data, steps):
            last, *_ = session.run(fetches, {images: x, labels: y, training: True})
        result = float(session.run(accuracy, {images: data.x_test, labels: data.y_test}))
    print(f"compat_v1_mlp, updates {update}: last loss {last:.3f}, test accuracy {100 * result:.1f} %")
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train in both ways and return the test accuracies."""
    steps = common.parse_steps(__doc__, argv)
    return {update: train(steps, update) for update in UPDATES}


if __name__ == "__main__":
    main()
