"""Plans: a schedule that was searched for on one model and one grid of timesteps, as a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, ValidationError
from torch import nn

from cachekit.adapter import Adapter
from cachekit.errors import ConfigError
from cachekit.for_model import ForModel
from cachekit.policies.planned import planned
from cachekit.preset import Preset
from cachekit.reuse import Blend, Forecast, Reuse, parse_reuse
from cachekit.segments import Segment, parse_segments

Where = str | os.PathLike[str]

FROZEN = ConfigDict(frozen=True, extra="forbid")


class Fingerprint(BaseModel):
    """What tells one model from another.

    Attributes:
        name: of its class.
        blocks: how many blocks there are.
        parameters: digest of the parameters' names and shapes (not of their values: a finetuned model has the same).
        long_skips: fusion and pairs of long skip connections that were added.
    """

    model_config = FROZEN

    name: str
    blocks: NonNegativeInt
    parameters: str
    long_skips: tuple[str, tuple[tuple[NonNegativeInt, NonNegativeInt], ...]] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of a model, wrapped or not."""
        from cachekit.long_skips import long_skips_of
        from cachekit.skip_source import fingerprint

        base, found = fingerprint(model), long_skips_of(model)
        added = None if found is None else (found.fusion, found.pairs)
        return cls(name=base["class"], blocks=base["blocks"], parameters=base["parameters"], long_skips=added)

    def check(self, model: nn.Module, what: str) -> None:
        """Compare a model with the one that something was made for.

        Raises:
            ConfigError: it is another one.
        """
        ours = Fingerprint.of(model)
        if ours == self:
            return
        wanted, found = self.model_dump(), ours.model_dump()
        said = [f"{key} {wanted[key]}, here {found[key]}" for key in ("name", "blocks", "long_skips") if wanted[key] != found[key]]
        differs = "; ".join(said) or "other names or shapes of parameters"
        raise ConfigError(f"this {what} was made for another model ({differs}); calibrate and search on this one")


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


class Plan(BaseModel):
    """Which steps of one sampler on one model are recomputed, and what the others return.

    ``wrap(model, plan)``, ``wrap(model, "plan.json")`` and ``wrap(model, "plan:FILE")`` follow it. Another model is refused by
    ``wrap``, another grid of timesteps at the first step that is not the plan's.

    Attributes:
        model: what it was made for.
        timesteps: the different timesteps of a generation in the scheduler's units, in the order of its steps.
        segments, reuse: as in ``wrap``.
        recompute: indices of the timesteps whose steps are recomputed, 0 among them.
        blocks: share of the blocks' runs that are left.
        error: mean over the calibration's runs of |x - x_full| / |x_full|, x the final samples.
        worst: the largest of them.
        seconds: of a run, on the machine that searched.
        runs: numbers of the calibration's runs.
    """

    model_config = FROZEN

    format: Literal["cachekit plan 1"] = "cachekit plan 1"
    model: Fingerprint
    timesteps: tuple[float, ...] = Field(min_length=1)
    segments: tuple[SegmentSpec, ...] = Field(min_length=1)
    reuse: ReuseSpec
    recompute: tuple[NonNegativeInt, ...] = Field(min_length=1)
    blocks: NonNegativeFloat
    error: NonNegativeFloat
    worst: NonNegativeFloat
    seconds: NonNegativeFloat
    runs: tuple[int, ...] = ()

    @property
    def full_steps(self) -> int:
        """How many steps are recomputed."""
        return len(self.recompute)

    def preset(self) -> Preset:
        """The plan as a preset, for any model: whoever takes it answers for its being the right one."""
        segments = [spec.segment() for spec in self.segments]
        return Preset(planned(self.recompute, self.timesteps), segments=segments, reuse=self.reuse.reuse())

    def save(self, path: Where) -> None:
        """Write it as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Where) -> Plan:
        """Read a file of ``save``.

        Raises:
            ConfigError: there is none, or it is no plan.
        """
        found: Plan = read_model(cls, path, "plan", "cachekit.search")
        return found

    def __str__(self) -> str:
        full = set(self.recompute)
        marks = "".join("#" if i in full else "." for i in range(len(self.timesteps)))
        return f"{marks}  {len(full)} of {len(marks)} steps recomputed, error {self.error:.5f} (at most {self.worst:.5f})"


@dataclass(frozen=True)
class FromPlan(ForModel):
    """A plan as a policy: made for the model that it is given to, or refused."""

    plan: Plan

    def for_model(self, model: nn.Module, adapter: Adapter) -> Preset:
        """The preset of the plan.

        Raises:
            ConfigError: it was made for another model.
        """
        self.plan.model.check(model, "plan")
        return self.plan.preset()


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
        raise ConfigError(f"{os.fspath(path)!r} is no {what}; make one with {maker}: {error}") from error
