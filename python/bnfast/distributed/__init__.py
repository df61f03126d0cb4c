"""Batch normalization over several processes: `bnfast.distributed.mpi`, for NumPy arrays over MPI. Imports nothing."""
