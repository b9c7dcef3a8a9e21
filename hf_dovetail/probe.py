"""A check that a model computes branches rightly, run once for architectures that the tests do not cover.

A model may accept a 4D mask and ignore it, or depend on the order of its keys in some other way. A drafted answer
would then silently differ, so such a model is tried on a tiny tree first, against its own plain forward passes.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .anatomy import CACHE
from .attention import TESTED_TYPES, BranchingMask
from .cache import GrowingCache, num_cache_layers
from .tree import DraftTree

logger = logging.get_logger(__name__)

_PREFIX = 6
_PARENTS = (-1, 0, 0, 1, 2)  # two branches of two nodes under the root
_TOLERANCE = 0.05  # of the logits' spread between the two branches; rounding stays far below, a leak far above

_verdicts: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def branches_rightly(model: PreTrainedModel) -> bool:
    """Whether one forward pass over branches gives the logits of a pass over each branch alone."""
    if model.config.get_text_config(decoder=True).model_type in TESTED_TYPES:
        return True
    if model.training:  # dropout would decide, and draw from the answer's random generator
        return False
    if model not in _verdicts:
        _verdicts[model] = _try(model)
        logger.info("%s %s branches", type(model).__name__, "computes" if _verdicts[model] else "does not compute")
    return _verdicts[model]


@torch.no_grad()
def _try(model: PreTrainedModel) -> bool:
    tokens = torch.arange(1, _PREFIX + len(_PARENTS) + 1, device="cpu").unsqueeze(0)
    tokens %= model.config.get_text_config().vocab_size
    prefix, nodes = tokens[:, :_PREFIX], tokens[:, _PREFIX:]
    tree = DraftTree(nodes, nodes.new_tensor([_PARENTS]), torch.zeros_like(nodes, dtype=torch.float32))
    try:
        together = _tree_logits(model, prefix, tree)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        logger.info("%s cannot take a tree: %s", type(model).__name__, error)
        return False
    leaves = [3, 4]
    alone = torch.stack([_path_logits(model, prefix, tree, leaf) for leaf in leaves])
    spread = (alone[0] - alone[1]).abs().max()
    return bool((together[leaves] - alone).abs().max() < _TOLERANCE * spread)


def _tree_logits(model: PreTrainedModel, prefix: Tensor, tree: DraftTree) -> Tensor:
    """(N, V) logits of every node, computed in one pass behind a cached prefix."""
    device, cache = model.device, GrowingCache(num_cache_layers(model.config))
    positions = torch.arange(_PREFIX, device=device).unsqueeze(0)
    model(input_ids=prefix.to(device), position_ids=positions, use_cache=True, **{CACHE: cache})
    slots = (_PREFIX + tree.depths).to(device)
    prefixes = tree.ancestors.new_ones(1, slots.shape[1], _PREFIX)
    allowed = torch.cat((prefixes, tree.ancestors), dim=-1).to(device)
    mask = BranchingMask(model)(allowed, slots, torch.cat((positions, slots), dim=1))
    output = model(
        input_ids=tree.tokens.to(device), position_ids=slots, attention_mask=mask, use_cache=True, **{CACHE: cache}
    )
    return output.logits[0].float()


def _path_logits(model: PreTrainedModel, prefix: Tensor, tree: DraftTree, leaf: int) -> Tensor:
    """(V,) logits behind one path, computed without a cache."""
    ids = torch.cat((prefix, tree.tokens[:, tree.path(leaf)]), dim=1)
    return model(input_ids=ids.to(model.device), use_cache=False).logits[0, -1].float()
