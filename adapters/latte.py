"""Latte (arXiv 2401.03048): a spatial and a temporal block are one unit, and the model rearranges the stream between them.

Identity breaks at each rearrangement. That nothing else happens there, but for the temporal position embedding that is added
in the first unit, is what these adapters say.
"""

from __future__ import annotations

from cachekit.adapter import Adapter

_SPATIAL, _TEMPORAL = r"transformer_blocks\.\d+", r"temporal_transformer_blocks\.\d+"
_EVEN, _ODD = r"blocks\.\d*[02468]", r"blocks\.\d*[13579]"

# diffusers, and the original text-to-video class: two lists.
LATTE_T2V = Adapter(
    name="latte",
    classes=("LatteTransformer3DModel", "LatteT2V"),
    range=1000,
    unit=2,
    relayout=((_SPATIAL, _TEMPORAL), (_TEMPORAL, _SPATIAL)),
    adds=r"temporal_transformer_blocks\.0",
    attention=("attn1",),
    cross_attention=("attn2",),
    mlp=("ff",),
    temporal=_TEMPORAL,
    # Computed, or used in training only. The other names are the same in both classes.
    unneeded=("pos_embed.pos_embed", "temp_pos_embed", "caption_projection.y_embedding"),
)
# The original class-to-video class: one list, taken in pairs.
LATTE = Adapter(
    name="latte-class",
    classes=("Latte",),
    range=1000,
    unit=2,
    relayout=((_EVEN, _ODD), (_ODD, _EVEN)),
    adds=r"blocks\.1",
    attention=("attn",),
    cross_attention=(),
    mlp=("mlp",),
    temporal=_ODD,
    unneeded=("pos_embed", "temp_embed"),
)
