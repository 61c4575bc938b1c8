"""PixArt-alpha and -sigma (arXiv 2310.00426, 2403.04692): diffusers' class and the original repository's."""

from __future__ import annotations

from cachekit.adapter import Adapter

PIXART = Adapter(
    name="pixart",
    classes=("PixArtTransformer2DModel", "PixArt", "PixArtMS"),
    range=1000,
    attention=("attn1", "attn"),
    cross_attention=("attn2", "cross_attn"),
    mlp=("ff", "mlp"),
)
