"""The shelf of adapters: `cpd.Pruner` inside the training loops of other libraries. One file each.

Each is imported from its own module, as it needs its library; what only steps an optimizer (plain
loops, Accelerate, timm) needs none: `pruner.attach(optimizer)`.
"""

from __future__ import annotations

from cpd import _torchvision

_torchvision.ensure()  # libraries of models import torchvision where it is installed
