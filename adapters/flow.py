"""Other backbones whose timesteps need a word: their range, and who takes t / 1000."""

from __future__ import annotations

from cachekit.adapter import Adapter

FLUX = Adapter(
    name="flux",
    classes=("FluxTransformer2DModel", "ChromaTransformer2DModel"),
    range=1000,
    scale=1000,
    main=("hidden_states", 1),
    mlp=("ff", "ff_context", "proj_mlp"),
)
STABLE_DIFFUSION_3 = Adapter(name="sd3", classes=("SD3Transformer2DModel",), range=1000, main=("hidden_states", 1))
WAN = Adapter(name="wan", classes=("WanTransformer3DModel",), range=1000, attention=("attn1",), mlp=("ffn",))
COGVIDEOX = Adapter(name="cogvideox", classes=("CogVideoXTransformer3DModel",), range=1000, main=("hidden_states", 0))
