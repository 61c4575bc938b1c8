"""Adapters, one file a family of backbones. A new one: write its file, and add it to ``ADAPTERS``."""

from __future__ import annotations

from cachekit.adapter import Adapter
from cachekit.adapters.dit import DIT
from cachekit.adapters.flow import COGVIDEOX, FLUX, STABLE_DIFFUSION_3, WAN
from cachekit.adapters.hunyuan import HUNYUAN_DIT, HUNYUAN_VIDEO, HUNYUAN_VIDEO_ORIGINAL
from cachekit.adapters.latte import LATTE, LATTE_T2V
from cachekit.adapters.pixart import PIXART
from cachekit.adapters.skip_dit import read_released, released_pair

__all__ = ["ADAPTERS", "read_released", "released_pair"]

ADAPTERS: tuple[Adapter, ...] = (
    DIT,
    PIXART,
    LATTE_T2V,
    LATTE,
    HUNYUAN_DIT,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_ORIGINAL,
    FLUX,
    STABLE_DIFFUSION_3,
    WAN,
    COGVIDEOX,
)
