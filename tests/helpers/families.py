"""One small model per keras.applications family: small inputs, and weights like those of a trained model."""

from typing import Any

import keras
import numpy as np

# name: (height and width of the input, further arguments)
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "DenseNet121": (32, {}),
    "EfficientNetB0": (32, {}),
    "EfficientNetV2B0": (32, {}),
    "InceptionResNetV2": (75, {}),
    "InceptionV3": (75, {}),
    "MobileNet": (32, {"alpha": 0.25}),
    "MobileNetV2": (32, {"alpha": 0.35}),
    "MobileNetV3Small": (32, {"minimalistic": True}),
    "NASNetMobile": (32, {}),
    "ResNet50": (32, {}),
    "ResNet50V2": (32, {}),
    "Xception": (71, {}),
}
WITHOUT_BATCH_NORM = {"ConvNeXtTiny": (32, {}), "VGG16": (32, {})}
EVERY_RUN = ("MobileNetV2", "ResNet50")  # the others run under the marker `families`


def build(name: str) -> Any:
    """The model, with random batch norm weights, so that a norm that is left out changes the output."""
    extent, kwargs = (FAMILIES | WITHOUT_BATCH_NORM)[name]
    kind = getattr(keras.applications, name)
    keras.utils.set_random_seed(1)
    model = kind(weights=None, include_top=False, pooling="avg", input_shape=(extent, extent, 3), **kwargs)
    rng = np.random.default_rng(2)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.8, 1.2, weight.shape) for weight in layer.weights])
    return model


def batch(model: Any, size: int = 2) -> np.ndarray:
    return np.random.default_rng(3).uniform(0, 255, (size, *model.input_shape[1:])).astype("float32")
