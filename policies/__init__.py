"""Policies, one file a method. A new one: write its file, and add its name to ``POLICIES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cachekit.policies.accumulated import accumulated
from cachekit.policies.adacache import adacache
from cachekit.policies.at_most import at_most
from cachekit.policies.change import change
from cachekit.policies.dbcache import dbcache
from cachekit.policies.delta_dit import delta_dit
from cachekit.policies.duca import duca
from cachekit.policies.easycache import easycache
from cachekit.policies.error_budget import ErrorBudget, error_budget
from cachekit.policies.every import every
from cachekit.policies.fastercache import fastercache
from cachekit.policies.first import first
from cachekit.policies.first_block import first_block
from cachekit.policies.foca import foca
from cachekit.policies.fora import fora
from cachekit.policies.front_change import front_change
from cachekit.policies.hicache import hicache
from cachekit.policies.l2c import l2c
from cachekit.policies.last import last, tail
from cachekit.policies.magcache import magcache
from cachekit.policies.magcache_published import magcache_published
from cachekit.policies.moved import moved
from cachekit.policies.outside import outside
from cachekit.policies.pab import pab
from cachekit.policies.planned import planned
from cachekit.policies.scheduled import scheduled
from cachekit.policies.since import since
from cachekit.policies.skip_cache import skip_cache
from cachekit.policies.skip_every import skip_every
from cachekit.policies.smoothcache import smoothcache
from cachekit.policies.speca import speca
from cachekit.policies.taylorseer import taylorseer
from cachekit.policies.teacache import teacache
from cachekit.policies.tgate import tgate
from cachekit.policies.toca import toca

__all__ = [
    "ErrorBudget",
    "accumulated",
    "adacache",
    "at_most",
    "change",
    "dbcache",
    "delta_dit",
    "duca",
    "easycache",
    "error_budget",
    "every",
    "fastercache",
    "first",
    "first_block",
    "foca",
    "fora",
    "front_change",
    "hicache",
    "l2c",
    "last",
    "magcache",
    "magcache_published",
    "moved",
    "outside",
    "pab",
    "planned",
    "scheduled",
    "since",
    "skip_cache",
    "skip_every",
    "smoothcache",
    "speca",
    "tail",
    "taylorseer",
    "teacache",
    "tgate",
    "toca",
]

# Name in a spec string -> what makes the policy from the numbers behind it. magcache itself takes a
# calibration, so that the name is that of its published ratios. scheduled and l2c take masks and have none;
# what is fitted to a calibration's file has its own (cachekit.policies.calibrated).
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
        "accumulated": accumulated,
        "front-change": front_change,
        "moved": moved,
        "since": since,
        "first-block": first_block,
        "dbcache": dbcache,
        "taylorseer": taylorseer,
        "hicache": hicache,
        "foca": foca,
        "delta-dit": delta_dit,
        "adacache": adacache,
        "magcache": magcache_published,
        "teacache": teacache,
        "easycache": easycache,
        "speca": speca,
        "fora": fora,
        "pab": pab,
        "tgate": tgate,
        "error-budget": error_budget,
        "toca": toca,
        "duca": duca,
        "fastercache": fastercache,
    }
)
