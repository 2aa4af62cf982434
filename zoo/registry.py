"""All networks of the zoo, by name. The lists load without the libraries; builders import them."""

from __future__ import annotations

from . import (
    with_language,
    with_mm,
    with_monai,
    with_smp,
    with_timm,
    with_torchvision,
    with_transformers,
    with_ultralytics,
)
from .network import Network

LISTS = (
    with_timm.NETWORKS,
    with_torchvision.NETWORKS,
    with_transformers.NETWORKS,
    with_language.NETWORKS,
    with_smp.NETWORKS,
    with_ultralytics.NETWORKS,
    with_monai.NETWORKS,
    with_mm.NETWORKS,
)


def registry() -> dict[str, Network]:
    """Return name -> network, in the order of the lists."""
    found: dict[str, Network] = {}
    for network in (network for part in LISTS for network in part):
        if network.name in found:
            raise ValueError(f"{network.name} is listed twice")
        found[network.name] = network
    return found


def libraries() -> list[str]:
    """Return the libraries, in the order of the lists."""
    return list(dict.fromkeys(network.library for network in registry().values()))
