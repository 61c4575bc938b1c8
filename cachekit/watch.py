"""Watch a full model call, block by block, and make its graph."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from cachekit.containers import Containers
from cachekit.graph import Graph, Signature, Source, Visit, signature
from cachekit.tree import Path, arguments, tensors, without_tensors


class Relayout(Protocol):
    """Whether a model does nothing but rearrange the stream between two blocks (an adapter knows; identity can't show it)."""

    def relayouts(self, previous: str, block: str) -> bool: ...


class Known:
    """A tensor as it was once."""

    def __init__(self, tensor: Tensor) -> None:
        self.ref = weakref.ref(tensor)
        self.version = None if tensor.is_inference() else tensor._version
        self.copy = tensor.clone() if self.version is None else None

    def is_still(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, and nobody has written into it since."""
        if self.ref() is not tensor:
            return False
        if self.version is not None:
            return self.version == tensor._version
        # Inference tensors count no versions, so that only the values can tell.
        return self.copy is None or torch.equal(self.copy, tensor)


class _Produced(Known):
    """A block's output."""

    def __init__(self, tensor: Tensor, visit: int, output: Path) -> None:
        super().__init__(tensor)
        self.visit, self.output = visit, output


@dataclass
class _Seen:
    """A visit; ``ins`` and ``outs`` are without what it hands back untouched (``passes``).

    Attributes:
        in_place: (output, argument) of each tensor that it wrote into and returned.
        writes: it changed something else that it took.
    """

    block: str
    kind: str
    ins: list[tuple[Path, Signature]]
    origins: dict[Path, tuple[int, Path]]
    outs: list[tuple[Path, Signature]] = field(default_factory=list)
    passes: list[tuple[Path, Path]] = field(default_factory=list)
    in_place: list[tuple[Path, Path]] = field(default_factory=list)
    writes: bool = False
    structure: Any = None
    linked: str | None = None


class Watch:
    """Collects what each visit took and returned; ``graph()`` pairs it up at the end."""

    def __init__(self, relayout: Relayout) -> None:
        self.relayout = relayout
        self.seen: list[_Seen] = []
        self._produced: dict[int, _Produced] = {}
        self._last: list[_Produced] = []
        self._entering: list[tuple[Path, Known]] = []
        self._containers = Containers((), {})

    def before(self, block: str, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a block's inputs, before it may write into them."""
        ins, origins = [], {}
        self._entering = []
        self._containers = Containers(args, kwargs)
        for path, tensor in arguments(args, kwargs):
            ins.append((path, signature(tensor)))
            self._entering.append((path, Known(tensor)))
            produced = self._produced.get(id(tensor))
            if produced is not None and produced.is_still(tensor):
                origins[path] = produced.visit, produced.output
        self.seen.append(_Seen(block, kind, ins, origins))

    def after(self, result: Any) -> None:
        """Note a block's outputs."""
        seen, v = self.seen[-1], len(self.seen) - 1
        seen.in_place, seen.writes = self._written(tensors(result))
        outs = self._without_passes(seen, tensors(result))
        seen.outs = [(path, signature(tensor)) for path, tensor in outs]
        seen.structure = without_tensors(result)
        seen.linked = self._link(v)
        for produced in self._last:
            produced.copy = None
        self._last = []
        for path, tensor in outs:
            produced = _Produced(tensor, v, path)
            self._produced[id(tensor)] = produced
            self._last.append(produced)

    def _written(self, outs: list[tuple[Path, Tensor]]) -> tuple[list[tuple[Path, Path]], bool]:
        """What a block wrote into and returned, and whether it changed anything else that it took, in which its work would be lost
        where another value is returned in its place.
        """
        returned = {id(tensor): out for out, tensor in outs}
        in_place, writes = [], self._containers.changed()
        for path, known in self._entering:
            tensor = known.ref()
            if tensor is None or known.is_still(tensor):
                continue
            if id(tensor) in returned:
                in_place.append((returned[id(tensor)], path))
            else:
                writes = True
        return in_place, writes

    def _without_passes(self, seen: _Seen, outs: list[tuple[Path, Tensor]]) -> list[tuple[Path, Tensor]]:
        """Sort out what a block only hands back. A stored value in its place would be one that nobody computed."""
        left = []
        for out, tensor in outs:
            entered = next((path for path, known in self._entering if known.is_still(tensor)), None)
            if entered is None:
                left.append((out, tensor))
            else:
                seen.passes.append((entered, out))
        self._entering = []
        passed = {path for path, _ in seen.passes}
        seen.ins = [(path, sig) for path, sig in seen.ins if path not in passed]
        return left

    def ends_before(self, v: int) -> bool:
        """Whether no stretch of a segment leads into a visit that is over: a chain starts there, or one of the two always runs."""
        return self.seen[v].linked != "same" or any(seen.writes for seen in self.seen[max(0, v - 1) : v + 1])

    def has_extras(self, v: int) -> bool:
        """Whether a visit that is over returned a tensor for which it took none."""
        return len(self.seen[v].outs) > len(stream_inputs(self.seen[v].ins, self.seen[v].outs))

    def has_streams(self, v: int) -> bool:
        """Whether a visit that is over is a block: whether it returned a tensor that it took in, in a new version."""
        return bool(stream_inputs(self.seen[v].ins, self.seen[v].outs))

    def _link(self, v: int) -> str | None:
        if v == 0:
            return None
        seen, before = self.seen[v], self.seen[v - 1]
        streams = stream_inputs(seen.ins, seen.outs)
        # Every stream must have come through untouched. One alone may be a hint that is handed along beside a main
        # stream to which the model added something in between.
        if streams and all(seen.origins.get(path, (-1,))[0] == v - 1 for path in streams):
            return "same"
        numels = [_numel(sig) for _, sig in stream_pairs_default(before)]
        ours = [_numel(sig) for path, sig in seen.ins if path in streams]
        if streams and numels[:1] == ours[:1] and self.relayout.relayouts(before.block, seen.block):
            return "layout"
        return None

    def graph(self) -> Graph:
        """The graph of the whole call."""
        hints: dict[str, dict[Path, Path]] = {}
        visits = []
        for v, seen in enumerate(self.seen):
            following = self.seen[v + 1] if v + 1 < len(self.seen) else None
            if following is not None and following.linked == "same":
                hints[seen.kind] = {output: path for path, (source, output) in following.origins.items() if source == v}
            streams = pair(seen, hints.get(seen.kind, {}))
            taken = {path for path, _ in streams} if seen.linked == "same" else set()
            ins = dict(seen.ins)
            visits.append(
                Visit(
                    block=seen.block,
                    kind=seen.kind,
                    streams=streams,
                    passes=tuple(seen.passes),
                    in_place=tuple(seen.in_place),
                    writes=seen.writes,
                    extras=tuple(path for path, _ in seen.outs if path not in {out for _, out in streams}),
                    linked=seen.linked,
                    links=tuple((path, seen.origins[path][1]) for path in ins if path in taken),
                    sources=tuple(Source(path, *origin) for path, origin in seen.origins.items() if path not in taken),
                    signatures=tuple(ins[path] for path, _ in streams),
                    structure=seen.structure,
                    outputs=tuple(seen.outs),
                )
            )
        return Graph(tuple(visits))


def stream_inputs(ins: list[tuple[Path, Signature]], outs: list[tuple[Path, Signature]]) -> list[Path]:
    """The inputs that a block returns in a new version: of each signature, as many of the first as there are outputs."""
    left = [sig for _, sig in outs]
    found = []
    for path, sig in ins:
        if sig in left:
            left.remove(sig)
            found.append(path)
    return found


def stream_pairs_default(seen: _Seen) -> list[tuple[Path, Signature]]:
    """The block's own streams with their signatures, main stream first."""
    streams = set(stream_inputs(seen.ins, seen.outs))
    return [(path, sig) for path, sig in seen.ins if path in streams]


def pair(seen: _Seen, hint: dict[Path, Path]) -> tuple[tuple[Path, Path], ...]:
    """(argument path, output path) of each stream: as the next block of the chain takes them, else in order of shape."""
    ins = dict(stream_pairs_default(seen))
    pairs = {hint[out]: out for out, sig in seen.outs if hint.get(out) in ins and ins[hint[out]] == sig}
    for out, sig in seen.outs:
        if out not in pairs.values():
            free = [path for path, other in ins.items() if other == sig and path not in pairs]
            if free:
                pairs[free[0]] = out
    return tuple((path, pairs[path]) for path in ins if path in pairs)


def _numel(sig: Signature) -> int:
    return torch.Size(sig[0]).numel()
