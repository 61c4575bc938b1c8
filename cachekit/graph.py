"""The block graph of one model call: chains and long skip connections, found by tensor identity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cachekit.tree import Path

Signature = tuple[tuple[int, ...], torch.dtype, torch.device]


def signature(tensor: Tensor) -> Signature:
    """Shape, dtype and device: what must agree for one tensor to stand in for another."""
    return tuple(tensor.shape), tensor.dtype, tensor.device


def has_signature(value: Any, expected: Signature) -> bool:
    """Whether this is a tensor of that signature."""
    shape, dtype, device = expected
    return isinstance(value, Tensor) and value.shape == shape and value.dtype is dtype and value.device == device


@dataclass(frozen=True)
class Source:
    """A block input that is an earlier block's output.

    Attributes:
        path: argument path of the input.
        visit: index of the visit whose output it is.
        output: path in that output.
    """

    path: Path
    visit: int
    output: Path


@dataclass(frozen=True)
class ModuleVisit:
    """One call of a module within a visit of its block: attention, cross-attention or MLP.

    Attributes:
        name: its path in the block.
        kind: ``"attn"``, ``"cross_attn"`` or ``"mlp"``; None for one that is none of these, or writes into what it takes.
        temporal: its block attends over time.
        inputs, returned: every tensor that it takes, and that it returns.
        passes: (argument path, output path) of each tensor that it hands back untouched.
        entry: (output path, argument path) of each output that something of its signature enters for.
        structure: the result with its tensors left out.
        writes: it writes into what it takes, so that it can't be left out.
        tokenwise: each token of its output comes from the same token of its input, where that was tried.
        values: (batch, tokens) of each tensor of value vectors that self-attention made, where these are looked at.
    """

    name: str
    kind: str | None
    temporal: bool
    inputs: tuple[tuple[Path, Signature], ...]
    returned: tuple[tuple[Path, Signature], ...]
    passes: tuple[tuple[Path, Path], ...]
    entry: tuple[tuple[Path, Path], ...]
    structure: Any = field(compare=False, repr=False)
    writes: bool = False
    tokenwise: bool = False
    values: tuple[tuple[int, ...], ...] = ()

    @property
    def held(self) -> tuple[tuple[Path, Signature], ...]:
        """What is stored of it: all that it doesn't merely hand back."""
        passed = {out for _, out in self.passes}
        return tuple((path, sig) for path, sig in self.returned if path not in passed)


@dataclass(frozen=True)
class Visit:
    """One call of one block within a model call.

    Attributes:
        block: the block's path in the model, as in ``named_modules()``.
        kind: its class name.
        streams: (argument path, output path) of each tensor that it takes in and returns in a new version.
        passes: (argument path, output path) of each tensor that it hands back untouched.
        extras: output paths of tensors that no input stands for.
        in_place: (output path, argument path) of each tensor that it writes into and returns.
        writes: it changes something else that it takes, so that it can't be left out.
        linked: ``"same"`` where it gets the very tensors that the visit before returned, ``"layout"`` where an adapter says
            that the model only rearranges them in between, None where a chain starts.
        links: for a linked visit, the argument path of each stream and the output path in the visit before.
        sources: every other input that is an earlier block's output.
        signatures: of each stream's input, in the order of ``streams``.
        structure: the result with its tensors left out.
        outputs: every tensor that it returns in a new version, or in addition.
        modules: the calls of its modules, where they were looked at.
    """

    block: str
    kind: str
    streams: tuple[tuple[Path, Path], ...]
    passes: tuple[tuple[Path, Path], ...]
    extras: tuple[Path, ...]
    linked: str | None
    links: tuple[tuple[Path, Path], ...]
    sources: tuple[Source, ...]
    signatures: tuple[Signature, ...]
    structure: Any = field(compare=False, repr=False)
    outputs: tuple[tuple[Path, Signature], ...] = field(default=(), compare=False, repr=False)
    modules: tuple[ModuleVisit, ...] = field(default=(), compare=False, repr=False)
    in_place: tuple[tuple[Path, Path], ...] = ()
    writes: bool = False

    @property
    def is_block(self) -> bool:
        """A module without any stream (an embedder that stands in a list) is called, but is no block."""
        return bool(self.streams)


@dataclass(frozen=True)
class Cost:
    """What one visit costs: the block's parameters, and the floating-point operations of this call."""

    parameters: int
    flops: int


@dataclass(frozen=True)
class Graph:
    """The visits of a model call in order. ``blocks``, ``chains`` and segments count those that are blocks.

    Attributes:
        visits: every call of a candidate block, in order.
        costs: one for each visit, where they were measured (``cachekit.graph``).
        unit: how many blocks segments count as one.
        prediction: every tensor of the model's result, where it was looked at (``cachekit.graph``).
    """

    visits: tuple[Visit, ...]
    costs: tuple[Cost, ...] = field(default=(), compare=False)
    unit: int = field(default=1, compare=False)
    prediction: tuple[Signature, ...] = field(default=(), compare=False, repr=False)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the visits that are blocks."""
        return tuple(v for v, visit in enumerate(self.visits) if visit.is_block)

    @property
    def chains(self) -> tuple[tuple[int, ...], ...]:
        """Visits grouped into longest sequences linked by identity."""
        chains: list[list[int]] = []
        for v in self.blocks:
            if self.visits[v].linked == "same":
                chains[-1].append(v)
            else:
                chains.append([v])
        return tuple(tuple(chain) for chain in chains)

    @property
    def long_skips(self) -> tuple[tuple[int, int], ...]:
        """(early visit, late visit) of each long skip connection: an input of the stream's size and width beside it."""
        return tuple(
            (source.visit, v) for v, visit in enumerate(self.visits) for source in visit.sources if self._is_long_skip(v, source)
        )

    def nbytes(self, segments: Any = None, reuse: Any = "output", cond: Any = None) -> int:
        """How many bytes one branch will hold under these segments and this reuse; see ``cachekit.held.nbytes``."""
        from cachekit.held import nbytes

        return nbytes(self, segments, reuse, cond)

    def _is_long_skip(self, v: int, source: Source) -> bool:
        visit, early = self.visits[v], self.visits[source.visit]
        if not early.is_block or not visit.is_block or not _alike(early.signatures[0], visit.signatures[0]):
            return False
        # A stream that this block takes but no longer returns (the last of two) is no long skip connection.
        carried = source.visit == v - 1 and visit.linked == "same" and source.output not in {out for _, out in visit.links}
        return source.path not in {path for path, _ in visit.streams} and not carried

    def __str__(self) -> str:
        """A line for each visit: where chains start, what streams run through, what long skips come in, and its cost."""
        rows = [("block", "class", "chain", "streams", "long skip from", "parameters", "flops")]
        chain_of = {v: c for c, chain in enumerate(self.chains) for v in chain}
        skips = {late: early for early, late in self.long_skips}
        for v, visit in enumerate(self.visits):
            linked = {None: "starts ", "same": "", "layout": "relayout "}[visit.linked] if v in chain_of else "no block"
            rows.append(
                (
                    visit.block,
                    visit.kind,
                    f"{linked}{chain_of.get(v, '')}",
                    ", ".join(_name(path) for path, _ in visit.streams),
                    self.visits[skips[v]].block if v in skips else "",
                    f"{self.costs[v].parameters:,}" if self.costs else "",
                    f"{self.costs[v].flops:.3g}" if self.costs else "",
                )
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(
            [
                *table,
                f"{len(self.blocks)} blocks in {len(self.chains)} chains, {len(self.long_skips)} long skip connections",
            ]
        )


def _alike(a: Signature, b: Signature) -> bool:
    """One width and as many elements: what a model may rearrange into each other (frames of tokens, tokens over frames)."""
    return a[1:] == b[1:] and a[0][-1:] == b[0][-1:] and torch.Size(a[0]).numel() == torch.Size(b[0]).numel()


def _name(path: Path) -> str:
    return ".".join(f"argument {key}" if k == 0 and isinstance(key, int) else str(key) for k, key in enumerate(path))
