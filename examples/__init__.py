"""`cpd.Pruner` in five training loops; run each from here: ``python -m examples.plain``."""

from cpd import _torchvision

_torchvision.ensure()  # before a library of training imports torchvision by itself
