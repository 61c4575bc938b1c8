"""Long skip connections in transformers that no adapter knows, and in whole pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adding import shaken
from diffusers import (
    AllegroTransformer3DModel,
    AuraFlowTransformer2DModel,
    CogView4Transformer2DModel,
    LTXVideoTransformer3DModel,
    SanaTransformer2DModel,
    StableAudioDiTModel,
)
from pipelines import DIT_PIPELINE, FLUX_TRUE_CFG_PIPELINE, LATTE_PIPELINE, WAN_22_PIPELINE, Recipe, transformers
from torch import Tensor

import cachekit

TIMES = (900.0, 800.0, 700.0, 600.0)
Inputs = dict[str, Any]


FOUR = {"in_channels": 4, "out_channels": 4, "num_layers": 4}
# Class, configuration, shape of the sample, and the other arguments: of a random tensor its shape.
TRANSFORMERS: dict[str, tuple[Any, dict[str, Any], tuple[int, ...], Inputs]] = {
    "aura": (
        AuraFlowTransformer2DModel,
        {
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 16,
            "pos_embed_max_size": 64,
        },
        (2, 4, 8, 8),
        {"encoder_hidden_states": (2, 6, 16)},
    ),
    "sana": (
        SanaTransformer2DModel,
        {
            **FOUR,
            "patch_size": 1,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        (2, 4, 8, 8),
        {"encoder_hidden_states": (2, 6, 8)},
    ),
    "ltx": (
        LTXVideoTransformer3DModel,
        {**FOUR, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16},
        (2, 32, 4),
        {
            "encoder_hidden_states": (2, 6, 16),
            "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    "cogview": (
        CogView4Transformer2DModel,
        {
            **FOUR,
            "patch_size": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        (2, 4, 8, 8),
        {
            "encoder_hidden_states": (2, 6, 8),
            **{name: torch.full((2, 2), 32.0) for name in ("original_size", "target_size", "crop_coords")},
        },
    ),
    "audio": (
        StableAudioDiTModel,
        {
            **FOUR,
            "sample_size": 8,
            "attention_head_dim": 4,
            "num_key_value_attention_heads": 2,
            "num_attention_heads": 4,
            "cross_attention_dim": 4,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 4,
        },
        (2, 4, 8),
        {"encoder_hidden_states": (2, 6, 4), "global_hidden_states": (2, 1, 8)},
    ),
    "allegro": (
        AllegroTransformer3DModel,
        {
            **FOUR,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "caption_channels": 8,
        },
        (2, 4, 2, 8, 8),
        {"encoder_hidden_states": (2, 6, 8)},
    ),
}


def made(name: str) -> tuple[Any, Tensor, Inputs]:
    """A model with random weights, a sample, and the other arguments but the timestep."""
    build, config, shape, rest = TRANSFORMERS[name]
    model, noise = build(**config), torch.randn(shape)
    return model.eval(), noise, {key: torch.randn(value) if isinstance(value, tuple) else value for key, value in rest.items()}


def predictions(model: Any, noise: Tensor, rest: Inputs) -> list[Tensor]:
    """On a straight path from noise to what lies across it."""
    with torch.no_grad():
        samples = [(noise * t + noise.flip(-1) * (1000 - t)) / 1000 for t in TIMES]
        times = [torch.full((2,), t) for t in TIMES]
        return [model(x, timestep=t, return_dict=False, **rest)[0] for x, t in zip(samples, times, strict=True)]


@pytest.mark.parametrize("name", ["sana", "ltx", "cogview", "audio", "allegro"])
def test_a_transformer_that_no_adapter_knows(name: str) -> None:
    """Insertion changes nothing, the graph shows it, the fusions learn, Skip-Cache runs, and it all comes off again."""
    model, noise, rest = made(name)
    expected = predictions(model, noise, rest)
    cachekit.add_long_skips(model)
    assert all(torch.equal(a, b) for a, b in zip(predictions(model, noise, rest), expected, strict=True))
    inputs = {"hidden_states": noise, "timestep": torch.full((2,), 500.0), **rest}
    assert set(cachekit.graph(model, **inputs).long_skips) == {(0, 3), (1, 2)}
    model(**inputs, return_dict=False)[0].square().mean().backward()
    assert all(fusion.linear.weight.grad.any() for fusion in model.long_skips.values())
    full = predictions(shaken(model), noise, rest)
    cachekit.wrap(model, "N2-1000-50", segments="skip-1")
    cached = predictions(model, noise, rest)
    assert [sum(record.recomputed) for record in model.cachekit.stats.records] == [4, 2, 4, 2]
    assert [torch.equal(a, b) for a, b in zip(cached, full, strict=True)] == [True, False, True, False]
    cachekit.remove_long_skips(cachekit.unwrap(model))
    assert all(torch.equal(a, b) for a, b in zip(predictions(model, noise, rest), expected, strict=True))


def test_blocks_of_two_kinds_need_pairs() -> None:
    """AuraFlow's later blocks take both streams as one; what to join can't be found out, and is asked for."""
    model, noise, rest = made("aura")
    expected = predictions(model, noise, rest)
    cachekit.add_long_skips(model)
    with pytest.raises(cachekit.ModelError, match="give pairs= of blocks whose streams have one shape"):
        predictions(model, noise, rest)
    cachekit.add_long_skips(cachekit.remove_long_skips(model), pairs=[(2, 3)])
    assert all(torch.equal(a, b) for a, b in zip(predictions(model, noise, rest), expected, strict=True))


@pytest.mark.parametrize("recipe", [DIT_PIPELINE, LATTE_PIPELINE, FLUX_TRUE_CFG_PIPELINE, WAN_22_PIPELINE], ids=str)
def test_a_whole_pipeline(recipe: Recipe) -> None:
    """Its images are bit-equal at insertion, other ones with fusions that were trained, and Skip-Cache runs as it was written."""
    scheduler = next(iter(recipe.schedulers))
    expected = recipe.run(recipe.build(scheduler), 6)
    pipe = recipe.build(scheduler)
    for model in transformers(pipe):
        cachekit.add_long_skips(model)
    assert torch.equal(recipe.run(pipe, 6), expected)
    for model in transformers(pipe):
        shaken(model)
    full = recipe.run(pipe, 6)
    for model in transformers(pipe):
        cachekit.wrap(model, "every-1", segments="skip-1")
    assert torch.equal(recipe.run(pipe, 6), full) and not torch.equal(full, expected)
    for model in transformers(pipe):
        cachekit.wrap(cachekit.unwrap(model), "N2-1000-0", segments="skip-1")
    recipe.run(pipe, 6)
    for model in transformers(pipe):
        ran = {sum(record.recomputed) for record in model.cachekit.stats.records}
        blocks = len(model.cachekit.stats.records[0].recomputed)
        assert ran == {2 * model.cachekit.adapter.unit, blocks}
