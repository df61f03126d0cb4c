"""Names that frameworks have dropped, over bnfast's kernels. `bnfast.compat.v1` needs TensorFlow; this file doesn't."""
