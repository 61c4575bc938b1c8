"""Where to reuse: segments as users write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from cachekit.errors import ConfigError
from cachekit.inside import KINDS, MODULES
from cachekit.policy import Policy
from cachekit.reuse import Reuse
from cachekit.signals import Signal, signals

MODEL = "model"
UNCOND = "uncond"


@dataclass(frozen=True)
class Segment:
    """A contiguous range of blocks that shares one decision.

    Args:
        start, stop: block indices as in a Python slice: negative ones count from the end, None is the end itself.
            Where an adapter groups blocks into units, they count units. ``start="model"`` is the whole prediction,
            ``start="uncond"`` that of the unconditional pass of guidance alone.
        policy: for this segment alone; None takes ``wrap``'s.
        reuse: for this segment alone; None takes ``wrap``'s.
        modules: in place of the blocks, their modules of these kinds, which share the decision: ``"attn"``, ``"cross_attn"``,
            ``"mlp"``, ``"spatial_attn"``, ``"temporal_attn"``, or a tuple of them. The blocks themselves run on every step.
        each: a decision for every block (or unit) on its own, in place of one for all.
        advice: what to write instead where a stack is too short for it, for the message that says so.
    """

    start: int | str | None = None
    stop: int | None = None
    policy: Any = None
    reuse: Any = None
    modules: str | tuple[str, ...] | None = None
    each: bool = False
    advice: str = field(default="", repr=False, compare=False)

    @property
    def is_model(self) -> bool:
        """Whether the site is the whole prediction, of both passes of guidance or of the unconditional one."""
        return self.start in (MODEL, UNCOND)

    @property
    def is_pass(self) -> bool:
        """Whether it is that of the unconditional pass alone."""
        return self.start == UNCOND

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds of modules that it covers; none where it covers blocks."""
        return (self.modules,) if isinstance(self.modules, str) else tuple(self.modules or ())

    def units(self, units: int) -> range:
        """The units that it covers, of so many."""
        if isinstance(self.start, str):
            return range(0)
        return range(units)[slice(self.start, self.stop)]

    def visits(self, blocks: int, unit: int) -> list[int]:
        """The visits that it covers of a model that calls each of its blocks once, so many blocks a unit."""
        return [v for u in self.units(-(-blocks // unit)) for v in range(u * unit, min((u + 1) * unit, blocks))]


WRITTEN: Mapping[str, Segment] = MappingProxyType(
    {
        "all": Segment(),
        "stack": Segment(),
        "blocks": Segment(each=True),
        "modules": Segment(modules=KINDS),
        MODEL: Segment(MODEL),
        UNCOND: Segment(UNCOND),
        **{name: Segment(modules=name) for name in MODULES},
    }
)


def parse_segments(segments: Any) -> tuple[Segment, ...]:
    """``None``/``"middle"``, ``"all"``/``"stack"``, ``"skip-K"``, ``"blocks"``, ``"modules"``, a kind of module, ``"model"``,
    ``"uncond"``, (start, stop), a ``Segment``, or a list of these.

    Raises:
        ConfigError: anything else, or a range that no stack can have blocks in.
    """
    if segments is None or segments == "middle":
        return (Segment(1, -1),)
    if isinstance(segments, str) and segments in WRITTEN:
        return (WRITTEN[segments],)
    if isinstance(segments, str) and (match := re.fullmatch(r"skip-(\d+)", segments)):
        k = int(match[1])
        return (Segment(k, -k if k else None),)
    if isinstance(segments, Segment):
        return (_checked(segments),)
    if isinstance(segments, range | slice):
        if segments.step not in (None, 1):
            raise ConfigError(f"segments={segments!r}: a segment is contiguous; leave the step out, or give several segments")
        return (_checked(Segment(segments.start, segments.stop)),)
    if _is_pair(segments):
        return (_checked(Segment(*segments)),)
    if isinstance(segments, list | tuple) and segments and not any(isinstance(item, int | float) for item in segments):
        return tuple(found for item in segments for found in parse_segments(item))
    raise ConfigError(
        f"unknown segments={segments!r}; write 'middle', 'all', 'skip-K', 'model', 'uncond', 'blocks', 'modules', 'attn', "
        "'cross_attn', 'mlp', (start, stop), or a list of these and of cachekit.Segment(start, stop, policy=..., reuse=..., "
        "modules=...)"
    )


def _is_end(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_end(item) for item in value)


def _checked(segment: Segment) -> Segment:
    if segment.is_model and segment.stop is None and not segment.names and not segment.each:
        return segment
    if segment.modules is not None and not (segment.names and all(name in MODULES for name in segment.names)):
        raise ConfigError(f"modules={segment.modules!r}; write one of {', '.join(map(repr, MODULES))}, or a tuple of them")
    start, stop = segment.start, segment.stop
    if not _is_end(start) or not _is_end(stop):
        raise ConfigError(
            f"Segment({start!r}, {stop!r}): start and stop are block numbers or None, or start alone is 'model' or 'uncond'; "
            "'middle', 'all' and 'skip-K' go into segments= as they are"
        )
    if isinstance(start, int) and isinstance(stop, int) and (start < 0) == (stop < 0) and start >= stop:
        raise ConfigError(f"segment ({start}, {stop}) covers no block; stop is the first block behind it, as in a Python slice")
    return segment


@dataclass(frozen=True)
class Site:
    """A segment with all that it needs: what wrap() makes of its arguments."""

    segment: Segment
    policy: Policy[Any]
    reuse: Reuse

    @cached_property
    def signals(self) -> frozenset[Signal]:
        """What the policy looks at."""
        return signals(self.policy.required())
