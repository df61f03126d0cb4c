"""bnfast in TensorFlow graphs: the ops, their gradients, and a training step. Imports TensorFlow, never Keras."""
