"""The benchmark behind `bnfast bench`: the public API timed against other libraries.

shapes.csv       the tensor shapes, shared with the C++ benchmark and the tests
cases            a case (shape, layout, operation, dtype) and its input arrays
peers/           one class per library (torch, TensorFlow, Keras, JAX), one for bnfast, one for a plain copy
correctness      checks each result against float64 before anything is timed
allocator        makes glibc's malloc keep freed memory ("warm"), and undoes that
timing           interleaved rounds; medians of times and of ratios within a round
report           JSON and Markdown; figure: the picture, in the colours of style; machine: what it ran on
models, model_*  the same for whole models (`bnfast bench --model`), which {keras,torch,jax}_models build
quiet            starts TensorFlow without its log lines
Importing this package imports no peer. Nothing here imports bnfast.cli.
"""
