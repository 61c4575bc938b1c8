"""How many bytes a choice of segments and reuse will hold, before anything is run with it."""

from __future__ import annotations

import math
from typing import Any

import torch

from cachekit.graph import Graph, Signature
from cachekit.layout import expanded, lay_out
from cachekit.policy import Policy
from cachekit.refresh import AGES, refreshes, takes_tokens
from cachekit.reuse import parse_reuse
from cachekit.segments import Site, parse_segments
from cachekit.values import measures


def nbytes(graph: Graph, segments: Any = None, reuse: Any = "output") -> int:
    """Bytes of what one branch stores once its histories are full, for inputs of the shapes that the graph was made with.

    A history is full after as many recomputes as the reuse's ``length``. Classifier-free guidance in separate calls has two
    branches. What a policy that watches blocks (``change``) keeps of them is not counted. MLPs are taken to treat each token alone.

    Args:
        graph: from ``cachekit.graph``.
        segments, reuse: as in ``wrap``; a segment's own reuse wins.

    Raises:
        ConfigError: as ``wrap`` and the first call would.
    """
    written = parse_segments(segments)
    units = len(range(0, len(graph.blocks), graph.unit))
    sites = tuple(
        Site(segment, Policy[Any](), parse_reuse(reuse if segment.reuse is None else segment.reuse)) for segment in written
    )
    sites = expanded(sites, units)
    layout = lay_out(graph, sites, graph.unit)
    total = sum(sum(map(_size, graph.prediction)) * site.reuse.length for site in sites if site.segment.is_model)
    for visit, action, owners in zip(graph.visits, layout.actions, layout.modules, strict=True):
        if action is not None:
            outputs = dict(visit.outputs)
            total += sum(_size(outputs[path]) for path in action.hold) * sites[action.site].reuse.length
        for module, k in zip(visit.modules, owners, strict=True):
            if k is not None:
                total += sum(_size(sig) for _, sig in module.held) * sites[k].reuse.length
                if refreshes(sites[k].reuse) and takes_tokens(module):
                    tokens, (_, dtype, _) = math.prod(module.inputs[0][1][0][:2]), module.inputs[0][1]
                    total += tokens * AGES.itemsize
                    if measures(sites[k].reuse):
                        total += tokens * torch.promote_types(dtype, torch.float32).itemsize
    return total


def _size(sig: Signature) -> int:
    shape, dtype, _ = sig
    return math.prod(shape) * dtype.itemsize
