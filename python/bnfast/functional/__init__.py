"""Normalization as pure functions over arrays. This file is the table of contents.

`moments`, `group_norm`, `layer_norm` and `weight_norm` are functions here, as in `bnfast` itself, and hide the
submodules of the same names. Import from those by their full path: `from bnfast.functional.moments import Moments`.
"""

from .batch_norm import GradResult, TrainResult, batch_norm_grad, batch_norm_infer, batch_norm_train, moments
from .group_norm import NormGradResult, NormResult, group_norm, group_norm_grad, instance_norm, instance_norm_grad
from .layer_norm import layer_norm, layer_norm_grad
from .moments import Moments
from .renorm import renorm_correction
from .second_order import GradGradResult, batch_norm_grad_grad
from .weight_norm import weight_norm, weight_norm_grad

__all__ = [
    "GradGradResult",
    "GradResult",
    "Moments",
    "NormGradResult",
    "NormResult",
    "TrainResult",
    "batch_norm_grad",
    "batch_norm_grad_grad",
    "batch_norm_infer",
    "batch_norm_train",
    "group_norm",
    "group_norm_grad",
    "instance_norm",
    "instance_norm_grad",
    "layer_norm",
    "layer_norm_grad",
    "moments",
    "renorm_correction",
    "weight_norm",
    "weight_norm_grad",
]
