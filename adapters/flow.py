"""Other backbones whose timesteps need a word: their range, and who takes t / 1000."""

from __future__ import annotations

from cachekit.adapter import Adapter

FLUX = Adapter(
    name="flux",
    classes=("FluxTransformer2DModel", "ChromaTransformer2DModel"),
    range=1000,
    scale=1000,
    main=("hidden_states", 1),
    attention=("attn",),
    cross_attention=(),
    # In single blocks the MLP's second layer is the block's own projection, which takes the attention in as well.
    mlp=("ff", "ff_context", "proj_mlp"),
)
STABLE_DIFFUSION_3 = Adapter(
    name="sd3",
    classes=("SD3Transformer2DModel",),
    range=1000,
    main=("hidden_states", 1),
    # The second one, of dual-attention blocks, is self-attention too.
    attention=("attn", "attn2"),
    cross_attention=(),
    mlp=("ff", "ff_context"),
)
WAN = Adapter(
    name="wan",
    classes=("WanTransformer3DModel",),
    range=1000,
    attention=("attn1",),
    cross_attention=("attn2",),
    mlp=("ffn",),
)
COGVIDEOX = Adapter(
    name="cogvideox",
    classes=("CogVideoXTransformer3DModel",),
    range=1000,
    main=("hidden_states", 0),
    attention=("attn1",),
    cross_attention=(),
    mlp=("ff",),
)
