"""Hunyuan-DiT (arXiv 2405.08748) with its native long skip connections, and HunyuanVideo (arXiv 2412.03603) with two streams.

The long skips need no word here: the graph shows them. HunyuanVideo's text refiner holds a list of blocks too, which is not
part of the stack.
"""

from __future__ import annotations

from cachekit.adapter import Adapter

HUNYUAN_DIT = Adapter(
    name="hunyuan-dit",
    classes=("HunyuanDiT2DModel", "HunYuanDiT"),
    range=1000,
    attention=("attn1",),
    cross_attention=("attn2",),
    mlp=("ff", "mlp"),
)
HUNYUAN_VIDEO = Adapter(
    name="hunyuan-video",
    classes=(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanImageTransformer2DModel",
    ),
    range=1000,
    stack=r"(single_)?transformer_blocks\.\d+",
    main=("hidden_states", 0),
    attention=("attn",),
    cross_attention=(),
    mlp=("ff", "ff_context", "proj_mlp"),
)
HUNYUAN_VIDEO_ORIGINAL = Adapter(
    name="hunyuan-video-original",
    classes=("HYVideoDiffusionTransformer",),
    range=1000,
    stack=r"(double|single)_blocks\.\d+",
    # Attention is a function there, between layers that stand in the block itself: nothing that could be left out alone.
    attention=(),
    cross_attention=(),
    mlp=("img_mlp", "txt_mlp"),
    modulated=("img_attn_qkv",),
)
