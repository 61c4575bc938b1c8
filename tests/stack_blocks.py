"""What random stacks are made of: a small real layer in all the manners in which models write theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# The parameters of every block, in order.
ARGUMENTS = ("hidden_states", "encoder_hidden_states", "temb", "hint", "skip")
BOXES = ("bare", "tuple", "list", "dict")
# Those where blocks may be called in any order, and those whose long skip connections fix it.
ORDERED = ("list", "nested", "indexed")
LAYOUTS = (*ORDERED, "refiner", "hunyuan", "sequential", "uvit", "uvit-no-middle", "flux", "latte")
CALLS = ("positional", "keyword", "mixed", "varargs")
GLUES = ("", "", "", "add", "iadd", "reshape")


@dataclass(frozen=True)
class StackSpec:
    """All that makes one random stack, weights apart.

    Attributes:
        layout: how the blocks are held and walked (``LAYOUTS``).
        order: which block each visit calls; a block may be called twice.
        tokens: length of the sample's sequence.
        streams: 1, or 2 where the context is a stream too.
        swapped: blocks return (c, x), though they take (x, c).
        last_none: the last block returns None for the context.
        call: how blocks take their arguments (``CALLS``).
        in_place: blocks that write into their input and return it.
        extras: further outputs of each block that match no input; the model adds the first to its result.
        glue: what the model does to the main stream after each visit (``GLUES``).
        hint: a tensor given to every block; ``passed`` where each block returns it unchanged.
        experts: modules in a list inside each block.
        box: how blocks hold their outputs (``stack_blocks.BOXES``).
        signature: ``t``: forward(x, t, y); ``timestep``: forward(hidden_states, timestep, encoder_hidden_states).
        output: what forward returns: tensor, tuple or dict.
        time: how t is given: a batch of floats or integers, a tensor without dimensions, or a number.
    """

    layout: str = "list"
    depth: int = 3
    order: tuple[int, ...] = (0, 1, 2)
    width: int = 8
    tokens: int = 4
    streams: int = 1
    swapped: bool = False
    last_none: bool = False
    call: str = "positional"
    in_place: frozenset[int] = frozenset()
    extras: int = 0
    glue: tuple[str, ...] = ("", "", "")
    hint: str = "none"
    experts: int = 0
    box: str = "bare"
    signature: str = "t"
    output: str = "tensor"
    time: str = "float"

    def glued(self, position: int) -> bool:
        """Whether the model does something to the main stream after the block that it calls at this position."""
        return position < len(self.glue) and bool(self.glue[position])


@dataclass(frozen=True)
class Shape:
    """What one block is like.

    Attributes:
        width: channels of both streams.
        streams: 1, or 2 where the context is a stream too.
        swapped: it returns (c, x), though it takes (x, c).
        last_none: it returns None for the context.
        in_place: it writes into its input and returns it.
        extras: number of further outputs that match no input.
        hint: ``passed`` where it returns the hint that it was given.
        experts: modules in a list inside it.
        fuse: it takes a long skip connection in.
        bare: it takes and returns one tensor and nothing else.
        box: how its outputs are held (``BOXES``); ``bare`` where a single one comes alone.
    """

    width: int
    streams: int
    swapped: bool = False
    last_none: bool = False
    in_place: bool = False
    extras: int = 0
    hint: str = "none"
    experts: int = 0
    fuse: bool = False
    bare: bool = False
    box: str = "bare"

    @property
    def outputs(self) -> list[str]:
        """Names of what the block returns, in order: the streams x and c, the hint, extras."""
        if self.bare:
            return ["x"]
        streams = ["x", "c"] if self.streams == 2 else ["x"]
        passed = ["hint"] if self.hint == "passed" else []
        return [*(streams[::-1] if self.swapped else streams), *passed, *(f"extra{k}" for k in range(self.extras))]

    def pack(self, values: Mapping[str, Any]) -> Any:
        """What the block returns, from its outputs by name."""
        items = [values[name] for name in self.outputs]
        if len(items) == 1 and (self.bare or self.box == "bare"):
            return items[0]
        if self.box == "dict":
            return {f"out_{k}": item for k, item in enumerate(items)}
        return items if self.box == "list" else tuple(items)

    def unpack(self, result: Any) -> dict[str, Any]:
        """The outputs by name, from what the block returns."""
        if isinstance(result, Tensor):
            items: list[Any] = [result]
        else:
            items = list(result.values()) if isinstance(result, dict) else list(result)
        return dict(zip(self.outputs, items, strict=True))


class Block(nn.Module):
    """A layer: time modulation, mixing over channels and tokens. Counts its real calls in ``calls``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.shape = shape
        self.calls = 0
        self.modulation = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.across = nn.Linear(width, width)
        self.fuse = nn.Linear(2 * width, width) if shape.fuse else None
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(shape.experts)])
        self.context_mix = nn.Linear(width, width) if shape.streams == 2 else None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        hint: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Any:
        """Shapes: (B, N, D), (B, M, D), (B, 1, D), (1, 1, D), (B, N, D). Returns the shape's outputs."""
        self.calls += 1
        x, c, shape = hidden_states, encoder_hidden_states, self.shape
        if self.fuse is not None and skip is not None:
            x = self.fuse(torch.cat([x, skip], dim=-1))
        seen = x.mean(1, keepdim=True) if c is None else x.mean(1, keepdim=True) + c.mean(1, keepdim=True)
        shift, scale, gate = self.modulation(seen if temb is None else temb).chunk(3, dim=-1)
        inner = self.mix(x * (1 + scale) + shift)
        for expert in self.experts:
            inner = inner + expert(x)
        update = (1 + gate) * torch.tanh(inner + self.across(seen))
        if hint is not None:
            update = update + hint
        values: dict[str, Any] = {f"extra{k}": update.mean(dim=(1, 2)) * (k + 1) for k in range(shape.extras)}
        values |= {"x": x.add_(update) if shape.in_place else x + update, "c": None, "hint": hint}
        if self.context_mix is not None and c is not None and not shape.last_none:
            mixed = torch.tanh(self.context_mix(c) + seen)
            values["c"] = c.add_(mixed) if shape.in_place else c + mixed
        return shape.pack(values)


class VarBlock(Block):
    """A block whose signature says nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)
