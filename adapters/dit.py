"""DiT (arXiv 2212.09748): diffusers' class and the original repository's."""

from __future__ import annotations

from cachekit.adapter import Adapter
from cachekit.adapters.dit_keys import to_diffusers

# The position embedding is computed, never trained; diffusers keeps it out of the state dict.
DIT = Adapter(
    name="dit",
    classes=("DiTTransformer2DModel", "DiT"),
    range=1000,
    attention=("attn1", "attn"),
    cross_attention=(),
    mlp=("ff", "mlp"),
    translate=to_diffusers,
    unneeded=("pos_embed",),
)
