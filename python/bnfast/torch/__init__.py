"""bnfast.torch: PyTorch's normalizations on bnfast's kernels, and functions of whole models.

This file is the table of contents. `functional` chooses the way of a call, `modules/` has the drop-ins for torch.nn's
modules, `models/` the functions of whole models.
"""

try:
    import torch as _torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise  # another package is missing: its own message is clearer
    raise ImportError('bnfast.torch needs PyTorch, which is not installed: pip install "bnfast[torch]"') from error

from .functional import batch_norm
from .group_functional import group_norm, instance_norm, layer_norm
from .models.accelerate import accelerate, to_torch
from .models.fold import fold
from .models.fusion import compiler, fuse
from .models.recalibrate import recalibrate
from .models.report import report
from .modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .modules.group_norm import GroupNorm, LayerNorm
from .modules.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .modules.sync_batch_norm import SyncBatchNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "SyncBatchNorm",
    "accelerate",
    "batch_norm",
    "compiler",
    "fold",
    "fuse",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "recalibrate",
    "report",
    "to_torch",
]

del _torch
