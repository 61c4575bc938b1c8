"""A policy with the segments and the reuse that it goes with, and how presets combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cachekit.errors import ConfigError
from cachekit.policy import Policy


def _joined(segments: Any, combine: Callable[[Any], Any]) -> Any:
    """Segments, with those policies combined that some have of their own: theirs are asked, not the preset's."""
    from cachekit.spec import parse_policy

    if isinstance(segments, list | tuple):
        return type(segments)(_joined(segment, combine) for segment in segments)
    own = getattr(segments, "policy", None)
    return segments if own is None else replace(segments, policy=combine(parse_policy(own)))


@dataclass(frozen=True)
class Clash:
    """What two joined presets have where they disagree: neither's value. ``wrap``'s own argument may take its place.

    Attributes:
        name: ``"segments"`` or ``"reuse"``.
        ours, theirs: what either preset has.
    """

    name: str
    ours: Any
    theirs: Any


def settled(value: Any) -> Any:
    """A preset's segments or reuse, where nothing takes their place.

    Raises:
        ConfigError: presets were joined that disagree on it.
    """
    if isinstance(value, Clash):
        raise ConfigError(
            f"two presets with different {value.name} ({value.ours!r}, {value.theirs!r}): combine their policies, or give "
            f"{value.name}="
        )
    return value


def _agreed(name: str, ours: Any, theirs: Any, read: Callable[[Any], Any]) -> Any:
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    for value in (ours, theirs):
        if isinstance(value, Clash):
            return value
    return ours if ours == theirs or read(ours) == read(theirs) else Clash(name, ours, theirs)


@dataclass(frozen=True)
class Preset:
    """A policy together with the segments and the reuse that it was tuned or published with.

    ``wrap``'s own ``segments=`` and ``reuse=`` win over both. Combined with a policy by ``|`` or ``&`` it keeps them; segments
    with policies of their own are each combined with it. Two presets that disagree on one of them can be combined where
    ``wrap`` is given that one.
    """

    policy: Policy[Any]
    segments: Any = None
    reuse: Any = None

    def _join(self, other: Any, combine: Callable[[Any, Any], Any]) -> Preset:
        if isinstance(other, Policy):
            other = Preset(other)
        if not isinstance(other, Preset):
            return NotImplemented  # type: ignore[no-any-return]
        from cachekit.reuse import parse_reuse
        from cachekit.segments import parse_segments

        segments = _agreed("segments", self.segments, other.segments, parse_segments)
        if self.segments is None:
            segments = _joined(segments, lambda own: combine(self.policy, own))
        elif other.segments is None:
            segments = _joined(segments, lambda own: combine(own, other.policy))
        reuse = _agreed("reuse", self.reuse, other.reuse, parse_reuse)
        return Preset(combine(self.policy, other.policy), segments, reuse)

    def __or__(self, other: Any) -> Preset:
        return self._join(other, lambda a, b: a | b)

    def __ror__(self, other: Any) -> Preset:
        return self._join(other, lambda a, b: b | a)

    def __and__(self, other: Any) -> Preset:
        return self._join(other, lambda a, b: a & b)

    def __rand__(self, other: Any) -> Preset:
        return self._join(other, lambda a, b: b & a)
