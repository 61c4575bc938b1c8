"""Adapters, one file a family of backbones. A new one: write its file, and add it to ``ADAPTERS``."""

from __future__ import annotations

from cachekit.adapter import Adapter

ADAPTERS: tuple[Adapter, ...] = ()
