"""Model calls in which some samples of the batch are recomputed and the others reused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cachekit import module_store
from cachekit.batched import inputs_of, with_rows
from cachekit.call import Given, GraphChanged, KnownCall, Original, PlainCall
from cachekit.decisions import Decisions
from cachekit.graph import Graph
from cachekit.layout import Action, Layout
from cachekit.module_store import Entering
from cachekit.sample_decisions import SampleDecisions
from cachekit.sampled import Batched, Taken
from cachekit.samples import Part
from cachekit.tree import Path, arguments, get, pick, replaced, tensors
from cachekit.whole import whole_prediction

OTHER = "another shape, dtype or device"


class SubBatchCall(KnownCall):
    """A call whose blocks run on the samples that are recomputed.

    What a block computes is put back into a tensor of the whole batch, so that the model and every check see what they see on
    other steps: the reused samples' rows are what a reused block would have returned. The next block gets the rows as they
    were, so that a stretch of blocks takes them out once.
    """

    def __init__(self, graph: Graph, layout: Layout, decisions: SampleDecisions, batched: Batched) -> None:
        super().__init__(graph, layout, decisions)
        self.sampling, self.batched = decisions, batched
        # For each part: a tensor of the whole batch -> its version, and the part's rows.
        self._rows: dict[Part, Any] = {}

    def run(self, v: int, block: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block, on the samples for which its segment is recomputed."""
        action = self.layout.actions[v]
        part = self.sampling.part(action.site) if action is not None else None
        if action is None or part is None:
            return super().run(v, block, original, args, kwargs)
        given, returned = self.batched.visits[v]
        check(given, dict(arguments(args, kwargs)))
        rows = {path: self._take(part, pick(args, kwargs, path)) for path in given.paths}
        self.in_part, before = True, len(self.modules)
        try:
            result = super().run(v, block, original, *with_rows(rows, (args, kwargs)))
        finally:
            self.in_part = False
        self.decisions.shares[v] = part.share
        self.decisions.module_shares.update((n, part.share) for n in range(before, len(self.modules)))
        found = dict(tensors(result))
        check(returned, found, part)
        # What a block hands back as it came is the model's own tensor.
        handed = {id(tensor): path for path, tensor in rows.items()}
        whole: dict[Path, Tensor] = {}
        for path in returned.paths:
            at = handed.get(id(found[path]))
            whole[path] = self._put(v, action, part, path, found[path], args, kwargs) if at is None else pick(args, kwargs, at)
        return replaced(result, whole)

    def run_module(
        self, at: tuple[int, int], k: int, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any], entering: Entering
    ) -> Any:
        """Run a module, on the samples for which its segment is recomputed."""
        part = self.sampling.part(k)
        if part is None:
            return super().run_module(at, k, original, args, kwargs, entering)
        given, returned = self.batched.modules[at]
        rows = {path: self._take(part, pick(args, kwargs, path)) for path in given.paths}
        result = super().run_module(at, k, original, *with_rows(rows, (args, kwargs)), entering)
        self.decisions.module_shares[len(self.modules) - 1] = part.share
        found = dict(tensors(result))
        check(returned, found, part)
        seen = self.graph.visits[at[0]].modules[at[1]]
        reused = module_store.instead(self.decisions, k, at, seen, args, kwargs, entering, original)
        passed = {out for _, out in seen.passes}
        whole = {path: part.put(get(reused, path), found[path].detach()) for path in returned.paths - passed}
        return replaced(reused, whole)

    def _put(
        self, v: int, action: Action, part: Part, path: Path, rows: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        if path in action.hold:
            into = self.decisions.forecast(action.site, v, path, self._entry(action, path))
        else:
            visit = self.graph.visits[v]
            into = pick(args, kwargs, next(at for at, out in (*visit.streams, *visit.passes) if out == path))
        whole = part.put(into, rows.detach())
        self._note(part, whole, rows)
        return whole

    def _take(self, part: Part, tensor: Tensor) -> Tensor:
        """A part's rows; those of a tensor that nobody has written into since are taken once."""
        noted = self._rows.get(part, {}).get(tensor)
        if noted is not None and noted[0] == tensor._version:
            taken: Tensor = noted[1]
            return taken
        rows = part.take(tensor)
        self._note(part, tensor, rows)
        return rows

    def _note(self, part: Part, whole: Tensor, rows: Tensor) -> None:
        # Inference tensors don't say whether somebody wrote into them.
        if not whole.is_inference():
            noted = self._rows.setdefault(part, WeakTensorKeyDictionary())
            noted[whole] = whole._version, rows


def check(expected: Taken, found: dict[Path, Tensor], part: Part | None = None) -> None:
    """That tensors have the shapes that the first call showed, with the rows of a part of the batch where one is given.

    Raises:
        GraphChanged: they have others.
    """
    if found.keys() != expected.shapes.keys():
        raise GraphChanged(OTHER)
    for path, tensor in found.items():
        shape = expected.shapes[path]
        if part is not None and path in expected.paths:
            shape = (shape[0] // part.samples.count * len(part.chosen), *shape[1:])
        if tensor.shape != shape:
            raise GraphChanged(OTHER)


def known_call(graph: Graph, layout: Layout, decisions: Decisions) -> KnownCall:
    """A call whose graph is known."""
    if isinstance(decisions, SampleDecisions) and decisions.sampled.batched is not None:
        return SubBatchCall(graph, layout, decisions, decisions.sampled.batched)
    return KnownCall(graph, layout, decisions)


def run_part(
    decisions: Decisions, k: int, part: Part, under: Callable[[PlainCall, Given], Any], given: Given
) -> tuple[PlainCall, Any]:
    """Run the model on a part of the batch.

    Args:
        k: the segment that is the whole prediction.
        under: runs the model under a call, with these arguments.

    Returns:
        The call; and the prediction for the whole batch, the others' reused.

    Raises:
        GraphChanged: the call is not what the first one showed.
    """
    branch, call = decisions.branch, PlainCall()
    if branch.sampled is None or branch.sampled.batched is None:
        raise ValueError("nothing is known of this model's parts")
    inputs, returned = branch.sampled.batched.model
    check(inputs, dict(arguments(*given)))
    result = under(call, inputs_of(part, given))
    check(returned, dict(tensors(result)), part)
    decisions.shares.update((v, part.share) for v in range(len(call.recomputed)))
    reused = whole_prediction(decisions, k)
    return call, replaced(reused, {path: part.put(get(reused, path), rows.detach()) for path, rows in tensors(result)})
