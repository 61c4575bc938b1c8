"""Policies that come from a file: plans, and what is fitted to a calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cachekit.plan_file import FromPlan, Plan


def plan(file: str) -> FromPlan:
    """What ``cachekit.search`` found, from its file."""
    return FromPlan(Plan.load(file))


# Name in a spec string "NAME-NUMBERS:FILE" -> what makes the policy from the file and the numbers.
CALIBRATED: Mapping[str, Callable[..., Any]] = MappingProxyType({"plan": plan})
