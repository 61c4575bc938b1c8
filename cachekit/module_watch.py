"""Watch the calls of modules within their blocks, in a full call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cachekit.call import Original
from cachekit.graph import Graph, ModuleVisit, Signature, signature
from cachekit.inside import ATTENTION, Role, kind_of
from cachekit.refresh import is_tokenwise
from cachekit.tree import Path, arguments, tensors, without_tensors
from cachekit.values import Measures
from cachekit.watch import Known


class ModuleWatch:
    """Collects what each module took and returned, by the visit of its block."""

    def __init__(self) -> None:
        self.seen: dict[int, list[ModuleVisit]] = {}

    def call(
        self,
        v: int,
        name: str,
        role: Role,
        original: Original,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tokens: bool = False,
        measures: Measures | None = None,
    ) -> tuple[Any, ModuleVisit]:
        """Run a module within visit v; returns what it returned, and what was seen.

        Args:
            tokens: try whether an MLP treats each token alone, which costs half a call of it.
            measures: are shown the value vectors that the call makes.
        """
        taken = [(path, Known(tensor), signature(tensor), tensor) for path, tensor in arguments(args, kwargs)]
        result = original(*args, **kwargs)
        writes = any(not known.is_still(tensor) for _, known, _, tensor in taken)
        returned = tuple((path, signature(tensor)) for path, tensor in tensors(result))
        passes = tuple(
            (path, out) for out, made in tensors(result) for path, _, _, tensor in taken if tensor is made and not writes
        )
        inputs = tuple((path, sig) for path, _, sig, _ in taken)
        seen = ModuleVisit(
            name=name,
            kind=None if writes else kind_of(role, original, args, kwargs, result),
            temporal=role.temporal,
            inputs=inputs,
            returned=returned,
            passes=passes,
            entry=_entries(inputs, returned, {out for _, out in passes}),
            structure=without_tensors(result),
            writes=writes,
        )
        if measures is not None and seen.kind == ATTENTION:
            seen = replace(seen, values=measures.shapes)
        if tokens:
            seen = replace(seen, tokenwise=is_tokenwise(original, args, kwargs, seen, result))
        self.seen.setdefault(v, []).append(seen)
        return result, seen

    def onto(self, graph: Graph) -> Graph:
        """The graph with what was seen in each visit."""
        return replace(
            graph, visits=tuple(replace(visit, modules=tuple(self.seen.get(v, ()))) for v, visit in enumerate(graph.visits))
        )


def _entries(
    inputs: tuple[tuple[Path, Signature], ...], returned: tuple[tuple[Path, Signature], ...], passed: set[Path]
) -> tuple[tuple[Path, Path], ...]:
    """For each output the first input of its signature that no output before has taken."""
    found: dict[Path, Path] = {}
    for out, sig in returned:
        free = [path for path, other in inputs if other == sig and path not in found.values()]
        if free and out not in passed:
            found[out] = free[0]
    return tuple(found.items())
