"""What the reader of a file needs: `model.save` says once that it names bnfast's layers.

Keras calls `save_assets` of a layer when a whole model is saved, not for its weights alone. Nothing is written there.
"""

from __future__ import annotations

import logging
from typing import Any

_logger = logging.getLogger("bnfast")
_said = False


def save_assets(layer: Any, folder: Any) -> None:
    """The method of every layer that is saved under a name of bnfast's."""
    global _said
    if not _said:
        _said = True
        _logger.warning(
            "the file names bnfast's layers (%s): who opens it must import bnfast.keras before. "
            "bnfast.keras.save(model, path) writes Keras's layers instead",
            type(layer).__name__,
        )
