"""What Griffe, which reads the sources for the site, doesn't see by itself.

The section "Example:" of our docstrings holds doctests; Griffe reads the heading "Examples:" alone. And where a module
imports other functions off TensorFlow, the site shows those of TensorFlow.
"""

from __future__ import annotations

from typing import Any

import griffe

DIAGNOSIS = "bnfast.keras.models.diagnosis"
ON_TENSORFLOW = {
    "diagnose": f"{DIAGNOSIS}.diagnose.diagnose",
    "recalibrate": f"{DIAGNOSIS}.recalibrate.recalibrate",
    "Recalibration": f"{DIAGNOSIS}.recalibrate.Recalibration",
    "Watch": f"{DIAGNOSIS}.watch.Watch",
}


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for name, path in ON_TENSORFLOW.items():
            pkg["keras"].set_member(name, griffe.Alias(name, path, parent=pkg["keras"]))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
