"""Functions of whole Keras models: accelerate, fold, to_keras, patch, report."""
