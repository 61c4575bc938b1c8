"""Random stacks: small real transformers in every layout that the core must read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from stack_blocks import Block, Shape, StackSpec, VarBlock
from torch import Tensor, nn

# Channels of the sample, and length of the context.
CHANNELS, CONTEXT = 3, 2


@dataclass
class Given:
    """What one model call gives to every block, and what it collects from them."""

    temb: Tensor
    hint: Tensor | None
    aux: list[Tensor] = field(default_factory=list)


class Body(nn.Module):
    """Holds blocks some levels down, and walks them itself where it is called."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"inner": nn.ModuleDict({"blocks": blocks})})

    @property
    def blocks(self) -> Any:
        return self.layers["inner"].get_submodule("blocks")

    def forward(self, model: Stack, x: Tensor, c: Tensor, given: Given) -> Tensor:
        return model.walk(self.blocks, x, c, given)


class Stack(nn.Module):
    """The random transformer. Subclasses give the signatures."""

    def __init__(self, spec: StackSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.hint: nn.Linear | None
        self.embed = nn.Linear(CHANNELS, width)
        self.time = nn.Linear(width, width)
        self.context = nn.Linear(width, width)
        self.label = nn.Embedding(10, CONTEXT * width)
        self.head = nn.Linear(width, CHANNELS)
        self.hint = nn.Linear(width, width) if spec.hint != "none" or "iadd" in spec.glue or "add" in spec.glue else None
        self._make_blocks(spec)

    def _make_blocks(self, spec: StackSpec) -> None:
        made = [self._block(i) for i in range(spec.depth)]
        half, depth = spec.depth // 2, spec.depth
        if spec.layout == "nested":
            self.body = Body(nn.ModuleList(made))
        elif spec.layout in ("sequential", "indexed"):
            self.blocks: Any = nn.Sequential(*made)
        elif spec.layout == "uvit":
            self.in_blocks, self.mid_block = nn.ModuleList(made[:half]), made[half]
            self.out_blocks = nn.ModuleList([self._block(half + 1 + i) for i in range(half)])
        elif spec.layout == "uvit-no-middle":
            self.in_blocks = nn.ModuleList(made[:half])
            self.out_blocks = nn.ModuleList([self._block(half + i) for i in range(half)])
        elif spec.layout == "flux":
            self.double_blocks, self.single_blocks = (
                nn.ModuleList(made[: (depth + 1) // 2]),
                nn.ModuleList(made[(depth + 1) // 2 :]),
            )
        elif spec.layout == "latte":
            self.spatial = nn.ModuleList(made)
            self.temporal = nn.ModuleList([self._block(i) for i in range(depth)])
        else:
            self.blocks = nn.ModuleList(made)
        if spec.layout == "refiner":
            self.refiner = nn.ModuleList([self._block(0, bare=True) for _ in range(2)])

    def _block(self, i: int, bare: bool = False) -> Block:
        """Block i of the depth; a bare one takes and returns one tensor (a text refiner, a called nn.Sequential)."""
        spec = self.spec
        double = spec.layout == "flux" and i < (spec.depth + 1) // 2
        bare = bare or spec.layout == "sequential"
        fuse = (spec.layout == "hunyuan" and i >= spec.depth - spec.depth // 2) or (
            spec.layout.startswith("uvit") and i >= spec.depth // 2 + (spec.layout == "uvit")
        )
        shape = Shape(
            width=spec.width,
            streams=1 if bare or spec.layout == "latte" or (spec.layout == "flux" and not double) else spec.streams,
            swapped=spec.swapped,
            last_none=spec.last_none and i == spec.depth - 1,
            in_place=not bare and i in spec.in_place,
            extras=0 if bare else spec.extras,
            hint=spec.hint,
            experts=spec.experts,
            fuse=fuse,
            bare=bare,
            box=spec.box,
        )
        return (VarBlock if spec.call == "varargs" else Block)(shape)

    def run(self, x: Tensor, t: Any, c: Tensor) -> Any:
        """x: (B, N, CHANNELS), t: timestep, c: (B, CONTEXT, D). Returns the prediction, in the spec's container."""
        spec, width = self.spec, self.spec.width
        dtype = self.head.weight.dtype
        times = torch.as_tensor(t, dtype=torch.float32).reshape(-1).expand(x.shape[0])
        rates = torch.exp(torch.arange(width, dtype=torch.float32) * (-math.log(1000.0) / width))
        temb = self.time(torch.sin(times[:, None, None] * rates).to(dtype))
        x, c = self.embed(x.to(dtype)), self.context(c.to(dtype))
        hint = None if self.hint is None else self.hint(temb.mean(0, keepdim=True))
        given = Given(temb, hint)
        result = self.head(self._through(x, c, given)) + sum(given.aux)
        if spec.output == "tensor":
            return result
        return (result,) if spec.output == "tuple" else {"sample": result}

    def _through(self, x: Tensor, c: Tensor, given: Given) -> Tensor:
        layout = self.spec.layout
        if layout == "sequential":
            joined: Tensor = self.blocks(x + given.temb + c.mean(1, keepdim=True))
            return joined
        if layout == "nested":
            nested: Tensor = self.body(self, x, c, given)
            return nested
        if layout.startswith("uvit"):
            return self._uvit(x, c, given)
        if layout == "flux":
            return self._flux(x, c, given)
        if layout == "latte":
            return self._latte(x, c, given)
        if layout == "refiner":
            for block in self.refiner:
                c = block(c)
        return self.walk(self.blocks, x, c, given)

    def walk(self, blocks: Any, x: Tensor, c: Tensor, given: Given) -> Tensor:
        """The plain loop, with HunyuanDiT's popped long skips where the layout says so."""
        half, depth = self.spec.depth // 2, self.spec.depth
        popped: list[Tensor] = []
        for visit, i in enumerate(self.spec.order):
            skip = popped.pop() if self.spec.layout == "hunyuan" and i >= depth - half else None
            x, c = self._visit(blocks[i], visit, x, c, given, skip)
            if self.spec.layout == "hunyuan" and i < half:
                popped.append(x)
        return x

    def _uvit(self, x: Tensor, c: Tensor, given: Given) -> Tensor:
        popped: list[Tensor] = []
        visit = 0
        for block in self.in_blocks:
            x, c = self._visit(block, visit, x, c, given)
            popped.append(x)
            visit += 1
        if self.spec.layout == "uvit":
            x, c = self._visit(self.mid_block, visit, x, c, given)
            visit += 1
        for block in self.out_blocks:
            x, c = self._visit(block, visit, x, c, given, popped.pop())
            visit += 1
        return x

    def _flux(self, x: Tensor, c: Tensor, given: Given) -> Tensor:
        for visit, block in enumerate(self.double_blocks):
            x, c = self._visit(block, visit, x, c, given)
        joined = x if c is None else torch.cat([c, x], dim=1)
        for visit, block in enumerate(self.single_blocks):
            joined, _ = self._visit(block, len(self.double_blocks) + visit, joined, None, given)
        return joined[:, joined.shape[1] - x.shape[1] :]

    def _latte(self, x: Tensor, c: Tensor, given: Given) -> Tensor:
        """Two frames: (B * F, N, D) for spatial blocks, (B * N, F, D) for temporal ones."""
        batch, tokens, width = x.shape
        frames, sites = 2, tokens // 2
        x, temb = x.reshape(batch * frames, sites, width), given.temb
        for visit, (spatial, temporal) in enumerate(zip(self.spatial, self.temporal, strict=True)):
            given.temb = temb.repeat_interleave(frames, 0)
            x, _ = self._visit(spatial, 2 * visit, x, c.repeat_interleave(frames, 0), given)
            x = x.reshape(batch, frames, sites, width).permute(0, 2, 1, 3).reshape(batch * sites, frames, width)
            given.temb = temb.repeat_interleave(sites, 0)
            x, _ = self._visit(temporal, 2 * visit + 1, x, None, given)
            x = x.reshape(batch, sites, frames, width).permute(0, 2, 1, 3).reshape(batch * frames, sites, width)
        return x.reshape(batch, tokens, width)

    def _visit(
        self,
        block: Any,
        visit: int,
        x: Tensor,
        c: Tensor | None,
        given: Given,
        skip: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Call a block in the spec's manner and glue; returns both streams."""
        spec, shape = self.spec, block.shape
        temb, hint = given.temb, given.hint if spec.hint != "none" else None
        if spec.call == "keyword":
            result = block(hidden_states=x, encoder_hidden_states=c, temb=temb, hint=hint, skip=skip)
        elif spec.call == "mixed":
            result = block(x, temb=temb, skip=skip, encoder_hidden_states=c, hint=hint)
        else:
            result = block(x, c, temb, hint, skip)
        values = shape.unpack(result)
        if shape.extras:
            given.aux.append(values["extra0"].mean())
        x, c = values["x"], values["c"] if shape.streams == 2 else c
        return self._glue(visit, x, given.hint), c

    def _glue(self, visit: int, x: Any, hint: Any) -> Any:
        kind = self.spec.glue[visit] if self.spec.glued(visit) else ""
        if kind == "add":
            return x + hint
        if kind == "iadd":
            x += hint
        if kind == "reshape":
            return x.permute(1, 0, 2).permute(1, 0, 2)
        return x


class TStack(Stack):
    """The original DiT's signature, labels for conditioning."""

    def forward(self, x: Tensor, t: Any, y: Tensor) -> Any:
        return self.run(x, t, self.label(y).reshape(-1, CONTEXT, self.spec.width))


class TimestepStack(Stack):
    """The diffusers signature."""

    def forward(self, hidden_states: Tensor, timestep: Any, encoder_hidden_states: Tensor) -> Any:
        return self.run(hidden_states, timestep, encoder_hidden_states)


def build(spec: StackSpec, seed: int = 0) -> Stack:
    """The model of a spec, in evaluation mode, with weights of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (TStack if spec.signature == "t" else TimestepStack)(spec)
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
    return model.eval()


def blocks_of(model: nn.Module) -> list[Block]:
    """All blocks, in the order of registration."""
    return [module for module in model.modules() if isinstance(module, Block)]


def visits_of(model: Any) -> list[Block]:
    """The blocks that stand in lists, in the order in which the model calls them."""
    spec = model.spec
    if spec.layout.startswith("uvit"):
        return [*model.in_blocks, *model.out_blocks]
    if spec.layout == "flux":
        return [*model.double_blocks, *model.single_blocks]
    if spec.layout == "latte":
        return [block for pair in zip(model.spatial, model.temporal, strict=True) for block in pair]
    holder: Any = model.body.blocks if spec.layout == "nested" else model.blocks
    return [*(model.refiner if spec.layout == "refiner" else []), *(holder[i] for i in spec.order)]


def linked(spec: StackSpec) -> list[bool]:
    """For each of those visits, whether it gets the very tensors that the one before returned."""
    half, depth = spec.depth // 2, spec.depth
    if spec.layout == "latte":
        return [False] * (2 * depth)
    if spec.layout == "refiner":
        return [False, True, False, *_unglued(spec, range(len(spec.order) - 1))]
    if spec.layout == "flux":
        doubles = (depth + 1) // 2
        return [v != doubles and free for v, free in enumerate([False, *_unglued(spec, range(depth - 1))])]
    if spec.layout == "uvit":
        # The block in the middle stands in no list, and comes between.
        return [False, *_unglued(spec, range(half - 1)), False, *_unglued(spec, range(half + 1, 2 * half))]
    return [False, *_unglued(spec, range(len(spec.order) - 1))]


def _unglued(spec: StackSpec, positions: Sequence[int]) -> list[bool]:
    return [not spec.glued(position) for position in positions]


def calls(model: nn.Module) -> list[int]:
    """How often each block really ran."""
    return [block.calls for block in blocks_of(model)]
