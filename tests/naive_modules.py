"""Caching of modules as plain as can be: every module runs at every step, and what is reused is written over what it returned.

What is a module of which kind is written down here by hand, model by model; nothing of the library is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import original_zoo
import published
import zoo
from cases import Case, Shape
from torch import Tensor, nn

# Kind -> names within a block.
Names = Mapping[str, tuple[str, ...]]
_SELF: Names = {"attn": ("attn1",), "mlp": ("ff",)}
_CROSS: Names = {"attn": ("attn1",), "cross_attn": ("attn2",), "mlp": ("ff",)}
NAMES: Mapping[str, Names] = {
    zoo.DIT.name: _SELF,
    zoo.PIXART.name: _CROSS,
    zoo.LATTE.name: _CROSS,
    zoo.HUNYUAN_DIT.name: _CROSS,
    zoo.HUNYUAN_VIDEO.name: {"attn": ("attn",), "mlp": ("ff", "ff_context", "proj_mlp")},
    zoo.FLUX.name: {"attn": ("attn",), "mlp": ("ff", "ff_context", "proj_mlp")},
    zoo.SD3.name: {"attn": ("attn", "attn2"), "mlp": ("ff", "ff_context")},
    zoo.COGVIDEOX.name: _SELF,
    zoo.WAN.name: {"attn": ("attn1",), "cross_attn": ("attn2",), "mlp": ("ffn",)},
    published.MOCHI.name: {"attn": ("attn1",), "mlp": ("ff", "ff_context")},
    published.COGVIEW4.name: _SELF,
    original_zoo.DIT.name: {"attn": ("attn",), "mlp": ("mlp",)},
    original_zoo.PIXART.name: {"attn": ("attn",), "cross_attn": ("cross_attn",), "mlp": ("mlp",)},
    original_zoo.PIXART_MS.name: {"attn": ("attn",), "cross_attn": ("cross_attn",), "mlp": ("mlp",)},
    original_zoo.LATTE.name: {"attn": ("attn",), "mlp": ("mlp",)},
    original_zoo.LATTE_T2V.name: _CROSS,
    original_zoo.HUNYUAN_DIT.name: {"attn": ("attn1",), "cross_attn": ("attn2",), "mlp": ("mlp",)},
    original_zoo.HUNYUAN_VIDEO.name: {"mlp": ("img_mlp", "txt_mlp")},
}
TEMPORAL = {zoo.LATTE.name: "temporal_transformer_blocks.", original_zoo.LATTE_T2V.name: "temporal_transformer_blocks."}

# Step index, timestep -> recompute?
Decide = Callable[[int, float], bool]
# (index or timestep, output less beta times input) of full steps, newest first; where now is -> the forecast of one tensor.
Formula = Callable[[list[tuple[float, Tensor]], float], Tensor]


@dataclass
class Held:
    """Modules of one kind in a range of units, when they are recomputed, and what stands in for them otherwise.

    Attributes:
        places: "" for all blocks, "spatial" or "temporal" for those alone.
        formula: None holds the newest value.
        beta: share of the input that is taken off what is remembered, and added again; of modules with one of each.
    """

    kind: str
    decide: Decide
    start: int = 0
    stop: int | None = None
    places: str = ""
    formula: Formula | None = None
    beta: float = 0.0
    by_time: bool = False
    ran: list[bool] = field(default_factory=list)
    memory: dict[tuple[str, int, int], list[tuple[float, Tensor]]] = field(default_factory=dict)


def paths(case: Case, model: nn.Module, held: Held) -> list[str]:
    """The paths in the model of the modules that are held."""
    units = len(case.stack) // case.unit
    blocks = [case.stack[u * case.unit + k] for u in range(units)[held.start : held.stop] for k in range(case.unit)]
    if held.places:
        blocks = [block for block in blocks if is_temporal(case, block) == (held.places == "temporal")]
    names = NAMES[case.name].get(held.kind, ())
    # Not every block has all: a temporal one has no cross-attention, a single one's MLP has another name.
    return [f"{block}.{name}" for block in blocks for name in names if getattr(model.get_submodule(block), name, None) is not None]


def is_temporal(case: Case, block: str) -> bool:
    """Whether a block attends over time."""
    if case.name == original_zoo.LATTE.name:
        return int(block.rpartition(".")[2]) % 2 == 1
    return block.startswith(TEMPORAL.get(case.name, "none of them"))


def run(case: Case, model: nn.Module, times: Sequence[float], holds: Sequence[Held]) -> list[Tensor]:
    """The predictions of one generation (as ``running.generate``'s), in the model's own dtype."""
    step: dict[str, Any] = {}
    shape = Shape(dtype=next(model.parameters()).dtype)

    def leaves(held: Held, path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        n = step["calls"][path] = step["calls"].get(path, -1) + 1
        returned = list(result) if isinstance(result, tuple) else [result]
        now = step["t"] if held.by_time else float(step["i"])
        entered = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        for k, tensor in enumerate(returned):
            if not isinstance(tensor, Tensor):
                continue
            memory = held.memory.setdefault((path, n, k), [])
            added = held.beta * entered if held.beta else None
            if step["i"] == 0 or held.decide(step["i"], step["t"]):
                memory.insert(0, (now, tensor.clone() if added is None else tensor - added))
            else:
                value = memory[0][1].clone() if held.formula is None else held.formula(memory, now)
                returned[k] = value if added is None else value + added
        return tuple(returned) if isinstance(result, tuple) else returned[0]

    conditioning = case.conditioning(shape=shape)
    found = []
    with ExitStack() as hooks:
        for held in holds:
            for path in paths(case, model, held):
                hook = functools.partial(leaves, held, path)
                hooks.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        for i, t in enumerate(times):
            step.update(i=i, t=t, calls={})
            for held in holds:
                held.ran.append(i == 0 or held.decide(i, t))
            inputs = case.inputs(t, dtype=shape.dtype, conditioning=conditioning, start=times[0])
            found.append(case.output(model(**inputs)).clone())
    return found


def count(case: Case, model: nn.Module, held: Held) -> int:
    """How often the modules of a segment are called in one call of the model."""
    calls = 0

    def seen(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with ExitStack() as hooks:
        for path in paths(case, model, held):
            hooks.callback(model.get_submodule(path).register_forward_hook(seen).remove)
        model(**case.inputs(900.0))
    return calls
