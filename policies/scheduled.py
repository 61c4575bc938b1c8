"""Schedules that were found beforehand: for each kind of module, or each module, the steps at which it runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pydantic import validate_call
from pydantic.dataclasses import dataclass

from cachekit.errors import ConfigError
from cachekit.policy import STRICT, Policy, Step
from cachekit.preset import Preset
from cachekit.segments import Segment

# What published files call the kinds, by diffusers' names of the modules.
_ALSO = {"attn1": "attn", "attn2": "cross_attn", "ff": "mlp"}
_KEY = re.compile(r"(?P<kind>[a-z_]+\d?)(?:-(?P<unit>\d+))?")


@dataclass(frozen=True, config=STRICT)
class marked(Policy[None]):
    """Recompute at the marked steps, and at all that lie behind the last mark's place.

    Raises:
        ConfigError: no marks; in a session, another number of steps than there are marks.
    """

    marks: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not self.marks:
            raise ConfigError("a schedule of no steps; give a mark for each step, 1 to recompute and 0 to reuse")

    def decide(self, state: None, step: Step) -> bool:
        if step.steps is not None and step.steps != len(self.marks):
            raise ConfigError(
                f"this schedule is for {len(self.marks)} steps, and the session has {step.steps}; "
                "sample with as many, or give another schedule"
            )
        return step.i >= len(self.marks) or self.marks[step.i]


@validate_call
def scheduled(masks: Mapping[str, Sequence[bool]]) -> Preset:
    """Each kind of module, or module, at steps of its own, and what it last returned at others (SmoothCache, arXiv 2411.10510).

    The form is that of SmoothCache's published schedules. Modules that no mask covers run on every step.

    Args:
        masks: kind of module (``"attn"``, ``"cross_attn"``, ``"mlp"``; diffusers' names ``"attn1"``, ``"attn2"``, ``"ff"`` too), or
            kind and unit (``"attn-0"``), -> a mark for each step, 1 to recompute and 0 to reuse.

    Raises:
        ConfigError: a name that can't be read, or masks of different lengths.
    """
    lengths = {len(marks) for marks in masks.values()}
    if len(lengths) != 1:
        raise ConfigError(f"masks of {sorted(lengths)} steps; give one mark for each step, of one generation, in all of them")
    segments = []
    for name, marks in masks.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise ConfigError(f"mask {name!r}: write a kind of module such as 'attn', or kind and block such as 'attn-0'")
        unit = None if match["unit"] is None else int(match["unit"])
        stop = None if unit is None else unit + 1
        kind = _ALSO.get(match["kind"], match["kind"])
        segments.append(Segment(unit, stop, modules=kind, policy=marked(tuple(marks))))
    return Preset(marked(tuple(any(marks) for marks in zip(*masks.values(), strict=True))), segments=segments, reuse="output")
