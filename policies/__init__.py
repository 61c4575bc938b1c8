"""Policies, one file a method. A new one: write its file, and add its name to ``POLICIES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cachekit.policies.at_most import at_most
from cachekit.policies.change import change
from cachekit.policies.every import every
from cachekit.policies.first import first
from cachekit.policies.last import last, tail
from cachekit.policies.moved import moved
from cachekit.policies.outside import outside
from cachekit.policies.skip_cache import skip_cache
from cachekit.policies.skip_every import skip_every

__all__ = ["at_most", "change", "every", "first", "last", "moved", "outside", "skip_cache", "skip_every", "tail"]

# Name in a spec string -> what makes the policy from the numbers behind it.
POLICIES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "skip-every": skip_every,
        "N": skip_cache,
        "every": every,
        "outside": outside,
        "first": first,
        "last": last,
        "tail": tail,
        "at-most": at_most,
        "change": change,
        "moved": moved,
    }
)
