"""Small diffusers transformers with random weights, and inputs in the form in which diffusers pipelines pass them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from cases import Case, Conditioning, Shape, floating, image, own_dtype, paths, thousandth, video, whole
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanVideoTransformer3DModel,
    LatteTransformer3DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn


def _mask(shape: Shape, tokens: int) -> Tensor:
    """Ones, with the last two tokens of every second prompt masked."""
    mask = torch.ones(shape.batch, tokens)
    mask[1::2, -2:] = 0
    return mask


def _dit() -> nn.Module:
    return DiTTransformer2DModel(  # type: ignore[no-any-return]
        num_attention_heads=2, attention_head_dim=16, out_channels=8, num_layers=6, sample_size=8
    )


def _dit_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    labels = (draw(shape.batch).abs() * 300).long() % 1000
    # The pipeline's second half is unconditional: class 1000.
    labels[1::2] = 1000
    return {"class_labels": labels}


def _pixart() -> nn.Module:
    return PixArtTransformer2DModel(  # type: ignore[no-any-return]
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=6,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=16,
    )


def _pixart_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    return {
        "encoder_hidden_states": draw(shape.batch, 6, 16),
        "encoder_attention_mask": _mask(shape, 6),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def _latte() -> nn.Module:
    return LatteTransformer3DModel(  # type: ignore[no-any-return]
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=5,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=16,
        video_length=3,
    )


def _latte_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    prompt = draw(shape.batch, 6, 16)
    return {"encoder_hidden_states": prompt, "enable_temporal_attentions": True, "return_dict": False}


def _hunyuan_dit() -> nn.Module:
    return HunyuanDiT2DModel(  # type: ignore[no-any-return]
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=8,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=5,
        text_len_t5=6,
    )


def _hunyuan_dit_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    grid = 4 * shape.scale
    rotary = get_2d_rotary_pos_embed(16, ((0, 0), (grid, grid)), (grid, grid), output_type="pt")
    return {
        "encoder_hidden_states": draw(shape.batch, 5, 16),
        "text_embedding_mask": _mask(shape, 5).long(),
        "encoder_hidden_states_t5": draw(shape.batch, 6, 16),
        "text_embedding_mask_t5": _mask(shape, 6).long(),
        "image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0]]).to(shape.dtype).repeat(shape.batch, 1),
        "style": torch.zeros(shape.batch, dtype=torch.long),
        "image_rotary_emb": rotary,
        "return_dict": False,
    }


def _hunyuan_video() -> nn.Module:
    return HunyuanVideoTransformer3DModel(  # type: ignore[no-any-return]
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_single_layers=4,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6),
    )


def _hunyuan_video_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    return {
        "encoder_hidden_states": draw(shape.batch, 6, 16),
        "encoder_attention_mask": _mask(shape, 6).to(shape.dtype),
        "pooled_projections": draw(shape.batch, 16),
        "guidance": torch.full((shape.batch,), 6000.0, dtype=shape.dtype),
        "attention_kwargs": None,
        "return_dict": False,
    }


def _flux() -> nn.Module:
    return FluxTransformer2DModel(  # type: ignore[no-any-return]
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _flux_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    side = 4 * shape.scale
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    return {
        "encoder_hidden_states": draw(shape.batch, 6, 16),
        "pooled_projections": draw(shape.batch, 16),
        "guidance": torch.full([1], 3.5).expand(shape.batch),
        "txt_ids": torch.zeros(6, 3).to(shape.dtype),
        "img_ids": ids.to(shape.dtype),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def _sd3() -> nn.Module:
    return SD3Transformer2DModel(  # type: ignore[no-any-return]
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=6,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def _sd3_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    return {
        "encoder_hidden_states": draw(shape.batch, 6, 16),
        "pooled_projections": draw(shape.batch, 16),
        "joint_attention_kwargs": None,
        "return_dict": False,
        "skip_layers": None,
    }


def _cogvideox() -> nn.Module:
    return CogVideoXTransformer3DModel(  # type: ignore[no-any-return]
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=6,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=6,
    )


def _cogvideox_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    return {
        "encoder_hidden_states": draw(shape.batch, 6, 16),
        "image_rotary_emb": None,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _wan() -> nn.Module:
    return WanTransformer3DModel(  # type: ignore[no-any-return]
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=6,
        rope_max_seq_len=32,
    )


def _wan_condition(draw: Callable[..., Tensor], shape: Shape) -> Conditioning:
    return {"encoder_hidden_states": draw(shape.batch, 6, 16), "attention_kwargs": None, "return_dict": False}


_LATTE_STACK = tuple(f"{name}.{k}" for k in range(5) for name in ("transformer_blocks", "temporal_transformer_blocks"))
_DOUBLE_SINGLE = paths("transformer_blocks", 3) + paths("single_transformer_blocks", 4)

DIT = Case("DiTTransformer2DModel", _dit, whole, image(4), _dit_condition, paths("transformer_blocks", 6))
PIXART = Case("PixArtTransformer2DModel", _pixart, whole, image(4), _pixart_condition, paths("transformer_blocks", 6))
LATTE = Case("LatteTransformer3DModel", _latte, whole, video(4), _latte_condition, _LATTE_STACK, unit=2)
HUNYUAN_DIT = Case(
    "HunyuanDiT2DModel",
    _hunyuan_dit,
    own_dtype,
    image(4),
    _hunyuan_dit_condition,
    paths("blocks", 8),
    ((2, 5), (1, 6), (0, 7)),
)
HUNYUAN_VIDEO = Case(
    "HunyuanVideoTransformer3DModel", _hunyuan_video, own_dtype, video(4), _hunyuan_video_condition, _DOUBLE_SINGLE
)
# Packed latents: tokens of 2 x 2 patches, (height / 2) * (width / 2) of them.
FLUX = Case("FluxTransformer2DModel", _flux, thousandth, lambda size: (size * size // 4, 16), _flux_condition, _DOUBLE_SINGLE)
SD3 = Case("SD3Transformer2DModel", _sd3, floating, image(4), _sd3_condition, paths("transformer_blocks", 6))
COGVIDEOX = Case(
    "CogVideoXTransformer3DModel",
    _cogvideox,
    whole,
    lambda size: (3, 4, size, size),
    _cogvideox_condition,
    paths("transformer_blocks", 6),
)
WAN = Case("WanTransformer3DModel", _wan, floating, video(4), _wan_condition, paths("blocks", 6))

CASES = (DIT, PIXART, LATTE, HUNYUAN_DIT, HUNYUAN_VIDEO, FLUX, SD3, COGVIDEOX, WAN)


def deeper(case: Case, depth: int) -> Case:
    """The case with so many blocks in each of its lists."""

    def make() -> nn.Module:
        model: Any = case.make()
        made: nn.Module = type(model).from_config({**model.config, "num_layers": depth})
        return made

    names = dict.fromkeys(path.rpartition(".")[0] for path in case.stack)
    return replace(case, make=make, stack=tuple(f"{name}.{i}" for i in range(depth) for name in names))
