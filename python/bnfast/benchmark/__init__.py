"""The public API timed against its peers: what `bnfast bench` runs.

shapes.csv     the shapes, which the C++ benchmark and the tests read too
cases          a shape in a layout, dtype and operation, and the arrays it works on
peers/         one class each: bnfast, torch, TensorFlow's fused op, Keras's layer, JAX; and a copy, the yardstick
agreement      every result against float64 sums, before anything is timed
allocator      glibc's malloc with freed memory kept ("warm"), and put back
timing         rounds over all peers in changing order; medians of times and of ratios within a round
report         JSON and Markdown; figure: the picture; machine: what it ran on
Importing this package imports none of the peers.
"""
