"""One training step: the mode of the call, and what a layer adds to plain batch norm."""
