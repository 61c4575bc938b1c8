"""DiT (arXiv 2212.09748): diffusers' class and the original repository's."""

from __future__ import annotations

from cachekit.adapter import Adapter

DIT = Adapter(name="dit", classes=("DiTTransformer2DModel", "DiT"), range=1000)
