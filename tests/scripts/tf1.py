"""A program of TensorFlow 1, as tutorials have it: tf.layers, placeholders, UPDATE_OPS, a Session."""

import numpy as np
import tensorflow.compat.v1 as tf
from sklearn.datasets import load_digits

tf.disable_v2_behavior()
tf.set_random_seed(0)
digits = load_digits()
images, labels = (digits.data / 16).astype("float32"), digits.target

x = tf.placeholder(tf.float32, [None, 64])
y = tf.placeholder(tf.int64, [None])
is_training = tf.placeholder(tf.bool)

hidden = tf.matmul(x, tf.get_variable("w1", [64, 64]))
hidden = tf.nn.relu(tf.layers.batch_normalization(hidden, momentum=0.9, training=is_training))
hidden = tf.matmul(hidden, tf.get_variable("w2", [64, 64]))
hidden = tf.nn.relu(tf.layers.batch_normalization(hidden, momentum=0.9, training=is_training, fused=False))
logits = tf.matmul(hidden, tf.get_variable("w3", [64, 10]))
loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))
accuracy = tf.reduce_mean(tf.cast(tf.equal(tf.argmax(logits, 1), y), tf.float32))
with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
    train = tf.train.AdamOptimizer(2e-3).minimize(loss)

with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    rng = np.random.default_rng(0)
    for _ in range(150):
        rows = rng.integers(0, 1500, 64)
        session.run(train, {x: images[rows], y: labels[rows], is_training: True})
    result = session.run(accuracy, {x: images[1500:], y: labels[1500:], is_training: False})
print(f"accuracy {result:.3f}")
assert result > 0.8
