"""One family of errors. Each message says what is wrong and what to write instead."""

from __future__ import annotations


class CachekitError(Exception):
    """Anything that cachekit refuses."""


class ConfigError(CachekitError, ValueError):
    """A policy, segment, reuse or adapter that can't mean what was written."""


class ModelError(CachekitError, TypeError):
    """A model that can't be wrapped, or was called in a way that can't be read."""
