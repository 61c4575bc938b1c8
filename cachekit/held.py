"""How many bytes a choice of segments and reuse will hold, before anything is run with it."""

from __future__ import annotations

import math
from typing import Any

import torch

from cachekit import guidance
from cachekit.errors import ConfigError
from cachekit.graph import Graph, ModuleVisit, Signature
from cachekit.layout import expanded, lay_out
from cachekit.policy import Policy
from cachekit.refresh import AGES, refreshes, takes_tokens
from cachekit.reuse import parse_reuse
from cachekit.segments import Site, parse_segments
from cachekit.values import measures


def nbytes(graph: Graph, segments: Any = None, reuse: Any = "output", cond: guidance.Cond | None = None) -> int:
    """Bytes of what one branch stores once its histories are full, for inputs of the shapes that the graph was made with.

    A history is full after as many recomputes as the reuse's ``length``. Classifier-free guidance in separate calls has two
    branches. Where ``"uncond"`` is a segment, it is the bytes of both passes: of their calls, for a graph of one of them, or, with
    ``cond="first"`` or ``"last"``, of their batch, for a graph of that; of a batch the conditional half alone is held, and the
    unconditional half's prediction. What a policy that watches blocks (``change``) keeps of them is not counted. MLPs are taken
    to treat each token alone.

    Args:
        graph: from ``cachekit.graph``.
        segments, reuse, cond: as in ``wrap``; a segment's own reuse wins.

    Raises:
        ConfigError: as ``wrap`` and the first call would, or a batch of both passes with an odd number of items.
    """
    written = parse_segments(segments)
    units = len(range(0, len(graph.blocks), graph.unit))
    sites = tuple(
        Site(segment, Policy[Any](), parse_reuse(reuse if segment.reuse is None else segment.reuse)) for segment in written
    )
    guidance.check(sites, cond, per_sample=False, audited=False)
    sites = expanded(sites, units)
    prediction, within = sum(map(_size, graph.prediction)), _within(graph, sites)
    total = sum(prediction * site.reuse.length for site in sites if site.segment.is_model) + within
    if not any(site.segment.is_pass for site in sites):
        return total
    if cond in guidance.HALVES:
        _check_even(graph)
        return total // 2
    # The conditional pass holds what it has within the model as well, and what the other one is rebuilt from.
    return total + within + (prediction if any(site.segment.is_pass and site.reuse.beta for site in sites) else 0)


def _within(graph: Graph, sites: tuple[Site, ...]) -> int:
    """What one call stores of blocks and modules."""
    layout, total = lay_out(graph, sites, graph.unit), 0
    for visit, action, owners in zip(graph.visits, layout.actions, layout.modules, strict=True):
        if action is not None:
            outputs = dict(visit.outputs)
            total += sum(_size(outputs[path]) for path in action.hold) * sites[action.site].reuse.length
        for module, k in zip(visit.modules, owners, strict=True):
            if k is not None:
                total += sum(_size(sig) for _, sig in module.held) * sites[k].reuse.length + _of_tokens(module, sites[k])
    return total


def _of_tokens(module: ModuleVisit, site: Site) -> int:
    """What is kept of each token of a module that is refreshed: its age, and a number where values are measured."""
    if not refreshes(site.reuse) or not takes_tokens(module):
        return 0
    shape, dtype, _ = module.inputs[0][1]
    each = AGES.itemsize + (torch.promote_types(dtype, torch.float32).itemsize if measures(site.reuse) else 0)
    return math.prod(shape[:2]) * each


def _check_even(graph: Graph) -> None:
    odd = next((shape for shape, *_ in graph.prediction if not shape or shape[0] % 2), None)
    if odd is not None:
        raise ConfigError(
            f"a prediction of shape {tuple(odd)} is no batch of both passes; make the graph with one, or leave cond out for passes "
            "that are separate calls"
        )


def _size(sig: Signature) -> int:
    shape, dtype, _ = sig
    return math.prod(shape) * dtype.itemsize
