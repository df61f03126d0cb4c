"""Argument checks of the NumPy API: convert what users pass, and raise every user-facing error.

arrays        objects with array data -> NumPy arrays over the same memory
checks        scalar arguments
axes          the channel axes of x
array_checks  array arguments, against the shape, dtype and axes of x
batch_norm    argument lists for _core's batch norm functions
group_norm    group, instance and layer norm: checks, then the call into _core
"""
