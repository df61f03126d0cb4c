"""The arguments of the NumPy API: checked, converted, and every user-facing error raised."""
