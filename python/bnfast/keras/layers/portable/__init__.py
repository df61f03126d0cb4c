"""A layer's step over keras.ops, for the backends of Keras other than TensorFlow: PyTorch and JAX.

The files have the names and functions of bnfast.tensorflow and bnfast.tensorflow.training. `kernels` is the seam: where
a backend has kernels of bnfast's, it calls them; elsewhere `reference` computes the same in Keras's own ops.
"""
