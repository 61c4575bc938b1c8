"""Published caching methods as their papers write them: every block is run at every step, and what is reused is written over it.

Nothing of the library is used but the cases' models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Case, Conditioning, Shape, image, paths, thousandth, video, whole
from diffusers import CogView4Transformer2DModel, Flux2Transformer2DModel, MochiTransformer3DModel
from torch import Tensor, nn
from zoo import COGVIDEOX, DIT, FLUX, HUNYUAN_VIDEO, LATTE, WAN

Streams = dict[str, Tensor]
# What the blocks before the range added to the main stream, step index, timestep -> recompute?
Decide = Callable[[Tensor, int, float], bool]


def _mochi() -> nn.Module:
    return MochiTransformer3DModel(  # type: ignore[no-any-return]
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=5,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=6,
    )


def _mochi_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    mask = torch.ones(shape.batch, 6, dtype=torch.bool)
    return {"encoder_hidden_states": draw(shape.batch, 6, 16), "encoder_attention_mask": mask, "return_dict": False}


def _cogview4() -> nn.Module:
    return CogView4Transformer2DModel(  # type: ignore[no-any-return]
        in_channels=4,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )


def _cogview4_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    size = torch.tensor([[64.0, 64.0]]).repeat(shape.batch, 1)
    return {
        "encoder_hidden_states": draw(shape.batch, 6, 16),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(shape.batch, 2),
        "return_dict": False,
    }


def _flux2() -> nn.Module:
    return Flux2Transformer2DModel(  # type: ignore[no-any-return]
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _flux2_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    side = 4 * shape.scale
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    zero = torch.zeros_like(rows)
    return {
        "encoder_hidden_states": draw(shape.batch, 6, 16),
        "guidance": torch.full([shape.batch], 3.5),
        "txt_ids": torch.zeros(6, 4),
        "img_ids": torch.stack([zero, rows, columns, zero], dim=-1).reshape(-1, 4).to(shape.dtype),
        "return_dict": False,
    }


MOCHI = Case("MochiTransformer3DModel", _mochi, whole, video(4), _mochi_condition, paths("transformer_blocks", 5))
COGVIEW4 = Case("CogView4Transformer2DModel", _cogview4, whole, image(4), _cogview4_condition, paths("transformer_blocks", 5))

# The model joins its two streams into one between the double and the single blocks.
FLUX2 = Case(
    "Flux2Transformer2DModel",
    _flux2,
    thousandth,
    lambda size: (size * size // 4, 16),
    _flux2_condition,
    paths("transformer_blocks", 2) + paths("single_transformer_blocks", 4),
)

# What the blocks return, in order; blocks of one stream return it alone.
MAIN, TEXT = "hidden_states", "encoder_hidden_states"
OUTPUTS: dict[str, tuple[str, ...]] = {
    DIT.name: (MAIN,),
    LATTE.name: (MAIN,),
    WAN.name: (MAIN,),
    FLUX.name: (TEXT, MAIN),
    FLUX2.name: (TEXT, MAIN),
    HUNYUAN_VIDEO.name: (MAIN, TEXT),
    COGVIDEOX.name: (MAIN, TEXT),
    MOCHI.name: (MAIN, TEXT),
    COGVIEW4.name: (MAIN, TEXT),
}


def change(now: Tensor, then: Tensor) -> float:
    """Mean |now - then| / mean |then|."""
    return float((now - then).abs().mean() / then.abs().mean())


@dataclass
class Full:
    """A recomputed step: its index, and the streams before and after the range."""

    i: int
    entered: Streams
    left: Streams


# The full steps so far (newest last), this step's index, and what enters now -> what is returned.
Value = Callable[[Sequence[Full], int, Streams], Streams]


def residual(fulls: Sequence[Full], i: int, entering: Streams) -> Streams:
    """What enters now, plus what the range added at the last full step."""
    last = fulls[-1]
    return {name: entering[name] + (last.left[name] - last.entered[name]) for name in last.left}


def forecast(formula: Callable[[list[tuple[float, Tensor]], float], Tensor]) -> Value:
    """What a formula makes of the range's outputs, against the number of the step; values newest first."""

    def value(fulls: Sequence[Full], i: int, entering: Streams) -> Streams:
        return {name: formula([(float(full.i), full.left[name]) for full in reversed(fulls)], float(i)) for name in fulls[-1].left}

    return value


@dataclass
class Range:
    """Blocks start ... stop - 1 of a stack, when they are recomputed, and what stands in for them otherwise.

    Who watches a block of them is told what it adds to the main stream, where it is recomputed.
    """

    start: int
    stop: int
    decide: Decide
    value: Value = residual
    watch: tuple[int, Callable[[Tensor], None]] | None = None
    fulls: list[Full] = field(default_factory=list)
    recomputed: list[bool] = field(default_factory=list)


def run(case: Case, model: nn.Module, times: Sequence[float], ranges: Sequence[Range]) -> list[Tensor]:
    """The predictions of one generation (as ``running.generate``'s), with these ranges cached; each notes what it decided."""
    blocks = [model.get_submodule(path) for path in case.stack]
    names = OUTPUTS[case.name]
    step: dict[Any, Any] = {"i": 0, "t": 0.0}

    def enters(block: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
        entering = {name: bound[name].clone() for name in names if bound.get(name) is not None}
        if block is blocks[0]:
            step["first"] = entering[MAIN]
        for held in ranges:
            if block is blocks[held.start]:
                step[id(held)] = entering
                # A range behind where the streams were joined has no residual before it to look at.
                now, first = entering[MAIN], step["first"]
                full = held.decide(now - first if now.shape == first.shape else now, step["i"], step["t"])
                held.recomputed.append(not held.fulls or full)
            if held.watch is not None and block is blocks[held.watch[0]]:
                step["watched"] = entering[MAIN]

    def leaves(block: nn.Module, args: Any, result: Any) -> Any:
        left = dict(zip(names, result, strict=True)) if isinstance(result, tuple) else {MAIN: result}
        for held in ranges:
            if held.watch is not None and block is blocks[held.watch[0]] and held.recomputed[-1]:
                held.watch[1](left[MAIN] - step["watched"])
            if block is blocks[held.stop - 1]:
                if held.recomputed[-1]:
                    copies = {name: tensor.clone() for name, tensor in left.items()}
                    held.fulls.append(Full(step["i"], step[id(held)], copies))
                else:
                    left = held.value(held.fulls, step["i"], step[id(held)])
                    result = tuple(left[name] for name in names) if isinstance(result, tuple) else left[MAIN]
        return result

    conditioning = case.conditioning()
    found = []
    with ExitStack() as hooks:
        for block in blocks:
            for handle in (
                block.register_forward_pre_hook(enters, with_kwargs=True),
                block.register_forward_hook(leaves),
            ):
                hooks.callback(handle.remove)
        for i, t in enumerate(times):
            step.update(i=i, t=t)
            inputs = case.inputs(t, conditioning=conditioning, start=times[0])
            found.append(case.output(model(**inputs)).clone())
    return found
