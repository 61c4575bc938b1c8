"""Random block stacks: small real transformers in every shape that the core must read, and what draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

CHANNELS, CONTEXT = 3, 2

LISTS = ("list", "nested", "indexed", "refiner", "hunyuan")
LAYOUTS = (*LISTS, "sequential", "uvit", "uvit-no-middle", "flux", "latte")
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
    signature: str = "t"
    output: str = "tensor"
    time: str = "float"

    @property
    def simple(self) -> bool:
        """One list, one chain, nothing between the blocks."""
        return self.layout in ("list", "nested", "indexed") and not any(self.glue)


@dataclass(frozen=True)
class Shape:
    """What one block is like."""

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
        """Shapes: (B, N, D), (B, M, D), (B, 1, D), (1, 1, D), (B, N, D)."""
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
        extras = tuple(update.mean(dim=(1, 2)) * (k + 1) for k in range(shape.extras))
        x = x.add_(update) if shape.in_place else x + update
        if shape.bare:
            return x
        if self.context_mix is not None and c is not None:
            mixed = torch.tanh(self.context_mix(c) + seen)
            c = c.add_(mixed) if shape.in_place else c + mixed
            streams: tuple[Any, ...] = (x, None if shape.last_none else c)
        else:
            streams = (x,)
        if shape.swapped:
            streams = streams[::-1]
        passed = (hint,) if shape.hint == "passed" else ()
        result = (*streams, *passed, *extras)
        return result[0] if len(result) == 1 else result


class VarBlock(Block):
    """A block whose signature says nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


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
        items = list(result) if isinstance(result, tuple) else [result]
        streams, rest = items[: shape.streams], items[shape.streams :]
        if shape.streams == 2:
            x, c = streams[::-1] if shape.swapped else streams
        else:
            x = streams[0]
        if shape.extras:
            given.aux.append(rest[-shape.extras].mean())
        return self._glue(visit, x, given.hint), c

    def _glue(self, visit: int, x: Tensor, hint: Tensor | None) -> Tensor:
        kind = self.spec.glue[visit] if visit < len(self.spec.glue) else ""
        if kind == "add" and hint is not None:
            return x + hint
        if kind == "iadd" and hint is not None:
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


def calls(model: nn.Module) -> list[int]:
    """How often each block really ran."""
    return [block.calls for block in blocks_of(model)]


def given_time(spec: StackSpec, t: float, batch: int) -> Any:
    """A timestep in the form that the spec's sampler gives it."""
    if spec.time == "number":
        return t
    if spec.time == "scalar":
        return torch.tensor(t)
    return torch.full((batch,), t if spec.time == "float" else int(t), dtype=torch.float32 if spec.time == "float" else torch.int64)


def conditioning(spec: StackSpec, batch: int, seed: int) -> Tensor:
    """Labels (B,), or a context (B, CONTEXT, D)."""
    generator = torch.Generator().manual_seed(seed)
    if spec.signature == "t":
        return torch.randint(0, 10, (batch,), generator=generator)
    return torch.randn(batch, CONTEXT, spec.width, generator=generator)


def noise(spec: StackSpec, batch: int, seed: int, tokens: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, N, CHANNELS)."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(batch, tokens or spec.tokens, CHANNELS, generator=generator).to(dtype)


def tensor_of(output: Any) -> Tensor:
    """The prediction out of whatever holds it."""
    if isinstance(output, dict):
        output = output["sample"]
    elif isinstance(output, tuple):
        output = output[0]
    assert isinstance(output, Tensor)
    return output


def advance(x: Tensor, prediction: Tensor, gap: float) -> Tensor:
    """The next sample: never the same again, and never turned by more than a sampler would."""
    return x - (0.02 + 0.3 * abs(gap) / 1000) * torch.tanh(prediction.to(x.dtype) + 1)


@dataclass(frozen=True)
class Run:
    """One generation to be made: the timesteps, what it starts from, what it is conditioned on."""

    times: tuple[float, ...]
    seed: int = 0
    batch: int = 2
    tokens: int | None = None
    dtype: torch.dtype = torch.float32

    def steps(self, model: Stack) -> Iterator[Tensor]:
        """Each step's prediction; the sample moves on by it."""
        spec = model.spec
        x, y = noise(spec, self.batch, self.seed, self.tokens, self.dtype), conditioning(spec, self.batch, self.seed)
        following = (*self.times[1:], 0.0)
        for t, after in zip(self.times, following, strict=True):
            prediction = tensor_of(model(x, given_time(spec, t, self.batch), y))
            yield prediction.clone()
            x = advance(x, prediction, t - after)

    def outputs(self, model: Stack) -> list[Tensor]:
        """The predictions of all steps."""
        with torch.no_grad():
            return list(self.steps(model))


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two generations are the same bit by bit."""
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@st.composite
def stack_specs(draw: Any, layouts: Sequence[str] = LAYOUTS, plain: bool = False) -> StackSpec:
    """Any stack; ``plain`` ones have a single chain of one stream and nothing in between."""
    layout = draw(st.sampled_from(layouts))
    depth = draw(st.integers(1, 8))
    if layout == "uvit-no-middle":
        depth = max(2, depth - depth % 2)
    elif layout == "uvit":
        depth = max(3, depth - 1 + depth % 2)
    elif layout == "flux":
        depth = max(2, depth)
    elif layout == "latte":
        depth = draw(st.integers(1, 4))
    order = tuple(range(depth))
    spec = StackSpec(
        layout=layout,
        depth=depth,
        order=order,
        width=draw(st.sampled_from((4, 8))),
        tokens=draw(st.sampled_from((2, 4, 6))),
        call=draw(st.sampled_from(CALLS)),
        signature=draw(st.sampled_from(("t", "timestep"))),
        output=draw(st.sampled_from(("tensor", "tuple", "dict"))),
        time=draw(st.sampled_from(("float", "int", "scalar", "number"))),
        glue=("",) * 8,
    )
    if plain:
        return spec
    spec = replace(
        spec,
        extras=draw(st.sampled_from((0, 0, 1, 2))),
        hint=draw(st.sampled_from(("none", "none", "argument", "passed"))),
        experts=draw(st.sampled_from((0, 0, 3))),
    )
    return _with_streams(draw, _with_writes(draw, spec))


def _with_writes(draw: Any, spec: StackSpec) -> StackSpec:
    """Blocks that write in place, glue, blocks called twice: where a layout's own meaning allows for them."""
    depth, layout = spec.depth, spec.layout
    if layout in ("list", "nested", "indexed") and draw(st.integers(0, 3)) == 0:
        spec = replace(spec, order=tuple(draw(st.lists(st.integers(0, depth - 1), min_size=1, max_size=8))))
    if layout in ("list", "nested", "indexed", "refiner", "flux", "latte"):
        glue = draw(st.lists(st.sampled_from(GLUES), min_size=8, max_size=8)) if draw(st.booleans()) else [""] * 8
        spec = replace(spec, glue=tuple(glue))
        # With long skips, a block that writes into its input changes what a later one takes in: no model does that.
        if draw(st.integers(0, 2)) == 0:
            spec = replace(spec, in_place=frozenset(draw(st.sets(st.integers(0, depth - 1)))))
    return spec


def _with_streams(draw: Any, spec: StackSpec) -> StackSpec:
    if spec.layout == "flux":
        return replace(spec, streams=2, swapped=draw(st.booleans()))
    if spec.layout in ("latte", "sequential") or draw(st.booleans()):
        return spec
    last_none = draw(st.booleans()) and spec.order == tuple(range(spec.depth)) and not spec.layout.startswith("uvit")
    return replace(spec, streams=2, swapped=draw(st.booleans()), last_none=last_none)


@st.composite
def schedules(draw: Any, min_size: int = 2, max_size: int = 12) -> tuple[float, ...]:
    """Uneven falling timesteps in 1 ... 999, whole numbers."""
    drawn = draw(st.sets(st.integers(1, 999), min_size=min_size, max_size=max_size))
    return tuple(float(t) for t in sorted(drawn, reverse=True))
