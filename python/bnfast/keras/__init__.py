"""bnfast.keras: Keras 3 layers (TensorFlow backend) on bnfast's kernels, and functions of whole models.

This file is the table of contents. `layers/` has the layers, `models/` the functions; bnfast.tensorflow, which never
imports Keras, has what they compute.
"""

try:
    import keras as _keras
    import tensorflow as _tensorflow
except ModuleNotFoundError as error:
    if error.name not in ("keras", "tensorflow"):
        raise  # another package is missing (that of another Keras backend, say): its own message is clearer
    raise ImportError(
        f'bnfast.keras needs TensorFlow and Keras 3, and {error.name} is not installed: pip install "bnfast[demo]" '
        "(or tensorflow-cpu)"
    ) from error

if not hasattr(_keras, "__version__") or int(_keras.__version__.split(".")[0]) < 3:
    raise ImportError(
        "bnfast.keras needs Keras 3. Received: Keras " + getattr(_keras, "__version__", "of unknown version")
    )

from ..diagnosis.report import Diagnosis
from ..tensorflow import op as _op
from .layers.batch_norm import BatchNormalization
from .layers.batch_norm_add import BatchNormalizationAdd
from .layers.conditional import ConditionalBatchNormalization
from .layers.group_norm import GroupNormalization, InstanceNormalization
from .layers.layer_norm import LayerNormalization
from .layers.weight_norm import WeightNormalization
from .models.accelerate import accelerate
from .models.diagnosis.diagnose import diagnose
from .models.diagnosis.recalibrate import Recalibration, recalibrate
from .models.diagnosis.watch import Watch
from .models.fold import fold
from .models.patch import is_patched, patch, unpatch, uses_bnfast
from .models.report import report
from .models.to_keras import to_keras

__all__ = [
    "BatchNormalization",
    "BatchNormalizationAdd",
    "ConditionalBatchNormalization",
    "Diagnosis",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "Recalibration",
    "Watch",
    "WeightNormalization",
    "accelerate",
    "diagnose",
    "fold",
    "is_patched",
    "patch",
    "recalibrate",
    "report",
    "to_keras",
    "unpatch",
    "uses_bnfast",
]

_op.register()  # so that a SavedModel with a training signature can be loaded

del _keras, _op, _tensorflow
