"""Drop-ins for torch.nn's normalizations: subclasses with the same arguments, state and behaviour."""
