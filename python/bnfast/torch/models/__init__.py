"""Functions of whole modules: accelerate, to_torch, report, fold, recalibrate; and what torch.compile fuses."""
