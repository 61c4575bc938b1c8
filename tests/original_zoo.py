"""The stand-ins for original repositories' classes as cases, with their calls as those repositories' samplers make them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case, Conditioning, Shape, floating, image, own_dtype, paths, video, whole
from original_videos import FRAMES, HunYuanDiT, HYVideoDiffusionTransformer, Latte, LatteT2V
from originals import CHANNELS, PATCH, WIDTH, DiT, PixArt, PixArtMS
from torch import Tensor

Draw = Callable[..., Tensor]
NAMES = ("x", "t")


def _tokens(shape: Shape) -> int:
    return (8 * shape.scale // PATCH) ** 2


def _labels(draw: Draw, shape: Shape) -> Conditioning:
    labels = (draw(shape.batch).abs() * 5).long() % 10
    labels[1::2] = 10
    return {"y": labels}


def _lengths(shape: Shape, tokens: int) -> Tensor:
    mask = torch.ones(shape.batch, tokens, dtype=torch.long)
    mask[1::2, -2:] = 0
    return mask


def _pixart(draw: Draw, shape: Shape) -> Conditioning:
    return {"y": draw(shape.batch, 1, 6, 12), "mask": _lengths(shape, 6)[:, None, None]}


def _pixart_ms(draw: Draw, shape: Shape) -> Conditioning:
    size = torch.tensor([[64.0, 64.0]]).repeat(shape.batch, 1)
    return {**_pixart(draw, shape), "data_info": {"img_hw": size, "aspect_ratio": torch.ones(shape.batch, 1)}}


def _latte_t2v(draw: Draw, shape: Shape) -> Conditioning:
    return {"encoder_hidden_states": draw(shape.batch, 6, 12), "enable_temporal_attentions": True}


def _hunyuan_dit(draw: Draw, shape: Shape) -> Conditioning:
    angles = torch.linspace(0, 3, _tokens(shape) * WIDTH).view(-1, WIDTH)
    return {
        "encoder_hidden_states": draw(shape.batch, 4, 12),
        "text_embedding_mask": _lengths(shape, 4),
        "encoder_hidden_states_t5": draw(shape.batch, 5, 10),
        "text_embedding_mask_t5": _lengths(shape, 5),
        "image_meta_size": torch.full((shape.batch, 6), 0.5),
        "style": torch.zeros(shape.batch, dtype=torch.long),
        "cos_cis_img": angles.cos(),
        "sin_cis_img": angles.sin(),
        "return_dict": False,
    }


def _hunyuan_video(draw: Draw, shape: Shape) -> Conditioning:
    angles = torch.linspace(0, 3, FRAMES * _tokens(shape) * WIDTH).view(-1, WIDTH)
    return {
        "text_states": draw(shape.batch, 6, 12),
        "text_mask": _lengths(shape, 6),
        "text_states_2": draw(shape.batch, 8),
        "freqs_cos": angles.cos(),
        "freqs_sin": angles.sin(),
        "guidance": torch.full((shape.batch,), 6000.0),
        "return_dict": True,
    }


def _frames_first(size: int) -> tuple[int, ...]:
    return (FRAMES, CHANNELS, size, size)


_PAIRS = tuple(f"{name}.{k}" for k in range(4) for name in ("transformer_blocks", "temporal_transformer_blocks"))

DIT = Case("DiT", DiT, whole, image(CHANNELS), _labels, paths("blocks", 6), names=NAMES)
PIXART = Case("PixArt", PixArt, floating, image(CHANNELS), _pixart, paths("blocks", 5), names=NAMES)
PIXART_MS = Case("PixArtMS", PixArtMS, floating, image(CHANNELS), _pixart_ms, paths("blocks", 5), names=NAMES)
LATTE = Case("Latte", Latte, whole, _frames_first, _labels, paths("blocks", 8), names=NAMES, unit=2)
LATTE_T2V = Case("LatteT2V", LatteT2V, whole, video(CHANNELS, FRAMES), _latte_t2v, _PAIRS, unit=2)
HUNYUAN_DIT = Case(
    "HunYuanDiT", HunYuanDiT, own_dtype, image(CHANNELS), _hunyuan_dit, paths("blocks", 8), ((2, 5), (1, 6), (0, 7)), NAMES
)
HUNYUAN_VIDEO = Case(
    "HYVideoDiffusionTransformer",
    HYVideoDiffusionTransformer,
    own_dtype,
    video(CHANNELS, FRAMES),
    _hunyuan_video,
    paths("double_blocks", 3) + paths("single_blocks", 4),
    names=NAMES,
)

ORIGINALS = (DIT, PIXART, PIXART_MS, LATTE, LATTE_T2V, HUNYUAN_DIT, HUNYUAN_VIDEO)
