"""What calibrations and plans have in common as JSON files: their parts, and how they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, ValidationError

from cachekit.errors import ConfigError
from cachekit.reuse import Blend, Forecast, Reuse, parse_reuse
from cachekit.segments import Segment, parse_segments

Where = str | os.PathLike[str]

# A sample that ran away has an infinite error, for which JSON has no number.
FROZEN = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class SegmentSpec(BaseModel):
    """A ``Segment`` without a policy and a reuse of its own."""

    model_config = FROZEN

    start: int | Literal["model"] | None = None
    stop: int | None = None
    modules: tuple[str, ...] | None = None
    each: bool = False

    def segment(self) -> Segment:
        return Segment(self.start, self.stop, modules=self.modules, each=self.each)


def segment_specs(segments: Any) -> tuple[SegmentSpec, ...]:
    """Segments as a file keeps them.

    Raises:
        ConfigError: as ``wrap``, or some have a policy or reuse of their own, or are one pass of guidance.
    """
    found = parse_segments(segments)
    if any(segment.policy is not None or segment.reuse is not None for segment in found):
        raise ConfigError(f"segments={segments!r}: one decision covers them all here; leave their own policy and reuse out")
    if any(segment.is_pass for segment in found):
        raise ConfigError("the unconditional pass (segments='uncond') is no site of calibrations and plans; leave it out")
    return tuple(
        SegmentSpec.model_validate(
            {"start": segment.start, "stop": segment.stop, "modules": segment.names or None, "each": segment.each}
        )
        for segment in found
    )


class ReuseSpec(BaseModel):
    """A ``Forecast``."""

    model_config = FROZEN

    order: NonNegativeInt = 0
    beta: NonNegativeFloat = 0.0
    bound: PositiveFloat = 5.0
    axis: Literal["t", "grid"] = "t"
    blend: Blend = 0.0

    @classmethod
    def of(cls, reuse: Any) -> ReuseSpec:
        """What ``wrap`` would make of this, as a file keeps it.

        Raises:
            ConfigError: it can't be read, or a file can't hold it.
        """
        made = parse_reuse(reuse)
        if type(made) is not Forecast or callable(made.axis):
            raise ConfigError(
                f"reuse={reuse!r} can't be kept in a file; use 'output', 'residual', 'taylor-K' or a Forecast along t or the grid"
            )
        return cls(order=made.order, beta=made.beta, bound=made.bound, axis=made.axis, blend=made.blend)

    def reuse(self) -> Reuse:
        return Forecast(self.order, beta=self.beta, bound=self.bound, axis=self.axis, blend=self.blend)


def read_model(cls: type[Any], path: Where, what: str, maker: str) -> Any:
    """A pydantic model from a JSON file.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"there is no {what} to read at {os.fspath(path)!r}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{os.fspath(path)!r} is no {what}: {_first(error)}; make one with {maker}") from error


def _first(error: ValidationError) -> str:
    """What is wrong first, in a line: a file of another kind is wrong in every field."""
    first, *others = error.errors(include_url=False)
    place, given = ".".join(map(str, first["loc"])), first["input"]
    said = f"{place}: {first['msg']}" if place else str(first["msg"])
    said += f", not {given!r}" if isinstance(given, str | int | float) and len(repr(given)) < 40 else ""
    return said + (f"; {len(others)} more such" if others else "")
