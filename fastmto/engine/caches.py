"""Copies of weights that outlive the weights: a forward after a change must not see them."""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize


def forget_weight_copies() -> None:
    """Have the next forward read the parameters anew.

    Called whenever parameters were displaced, put back or stepped. Two caches would go on showing
    what they were:

    - inside one `torch.autocast` block, the 16-bit copies of the weights;
    - inside `torch.nn.utils.parametrize.cached()`, the parametrized weights.

    Costs next to nothing outside of both.
    """
    # Always: a block may be on around one that is switched off, and keep its copies.
    torch.clear_autocast_cache()
    if parametrize._cache:
        parametrize._cache.clear()
