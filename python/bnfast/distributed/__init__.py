"""Batch normalization over several processes: `bnfast.distributed.mpi` (NumPy arrays, MPI). Imports nothing."""
