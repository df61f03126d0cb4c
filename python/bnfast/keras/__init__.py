"""bnfast.keras: Keras 3 layers on bnfast's kernels, and functions of whole models; on TensorFlow, PyTorch and JAX.

This file is the table of contents. `layers/` has the layers, `models/` the functions. What they compute is in
bnfast.tensorflow, which never imports Keras, and for the other backends in `layers/portable/`.
"""

try:
    import keras as _keras
except ModuleNotFoundError as error:
    if error.name not in ("keras", "tensorflow", "torch", "jax"):
        raise  # another package is missing: its own message is clearer
    _install = {"torch": 'pip install "bnfast[torch]"', "jax": 'pip install "bnfast[jax]"'}.get(error.name)
    _install = _install or 'pip install "bnfast[keras]"'
    raise ImportError(
        "bnfast.keras needs Keras 3 and the framework that it runs on (KERAS_BACKEND; TensorFlow unless set), and "
        f"{error.name} is not installed: {_install}"
    ) from error

if not hasattr(_keras, "__version__") or int(_keras.__version__.split(".")[0]) < 3:
    raise ImportError(
        "bnfast.keras needs Keras 3. Received: Keras " + getattr(_keras, "__version__", "of unknown version")
    )

from ..diagnosis.report import Diagnosis
from .layers import framework as _framework
from .layers.batch_norm import BatchNormalization
from .layers.batch_norm_add import BatchNormalizationAdd
from .layers.conditional import ConditionalBatchNormalization
from .layers.group_norm import GroupNormalization, InstanceNormalization
from .layers.layer_norm import LayerNormalization
from .layers.weight_norm import WeightNormalization
from .models.accelerate import accelerate
from .models.diagnosis import Recalibration, Watch, diagnose, recalibrate
from .models.fold import fold
from .models.patch import is_patched, patch, unpatch, uses_bnfast
from .models.report import report
from .models.save import save
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
    "save",
    "to_keras",
    "unpatch",
    "uses_bnfast",
]

_framework.register()

del _framework, _keras
