"""diagnose, recalibrate and Watch: what a Keras model's batch norms see, and statistics computed from it.

probe         runs a model with chosen statistics in each batch norm and shows what it sees; the model stays as it is
source        the batches of arrays, datasets, PyDatasets and generators
recalibrate   moving statistics from data            diagnose      figures for bnfast.diagnosis.verdicts
score         loss and metrics of outputs            watch         a callback

They follow TensorFlow's graphs. On other backends of Keras each of them raises RuntimeError when it is called.
"""

from typing import TYPE_CHECKING

from ...layers.framework import ON_TENSORFLOW

if TYPE_CHECKING or ON_TENSORFLOW:
    from .diagnose import diagnose
    from .recalibrate import Recalibration, recalibrate
    from .watch import Watch
else:
    from .elsewhere import Recalibration, Watch, diagnose, recalibrate

__all__ = ["Recalibration", "Watch", "diagnose", "recalibrate"]
