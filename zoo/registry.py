"""All networks of the zoo, by name. Lists load without the libraries; builders import them."""

from __future__ import annotations

from .network import Network
from .with_timm import NETWORKS as TIMM

LISTS = (TIMM,)


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
