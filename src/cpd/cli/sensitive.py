"""What `cpd sensitivity` measures: names become data, a task and scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from cpd.cli.samples import Samples

if TYPE_CHECKING:
    from cpd.sensitivity import Sensitivity

__all__ = ["limited", "measured"]


def measured(
    network: nn.Module,
    data: Any,
    task: Any,
    importance: Any,
    sizes: tuple[int, int],
    ratios: Sequence[float] | None = None,
    depth: bool = False,
) -> Sensitivity:
    """The sensitivity of a network on the validation samples of a data set.

    ``sizes`` are the batches and the samples of each; ``depth`` measures residual branches too.
    An importance that reads gradients or activations reads them of the same samples.
    """
    from cpd.comb import comb
    from cpd.sensitivity import RATIOS, sensitivity

    samples = Samples(data, task, "val", *sizes)
    groups = comb(network.eval(), samples.inputs[0], depth=depth)
    scores = samples.scores(importance, network, groups)
    return sensitivity(
        network, groups, scores, samples.batches, samples.loss, ratios=ratios or RATIOS
    )


def limited(found: Sensitivity, rise: float) -> str:
    """One line of YAML with the limits at a rise: of a recipe, or behind ``prune --limits``."""
    return f"limits: {json.dumps(found.limits(rise))}"
