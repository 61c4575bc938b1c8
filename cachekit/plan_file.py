"""Plans: a schedule that was searched for on one model and one grid of timesteps, as a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt
from torch import nn

from cachekit.adapter import Adapter
from cachekit.fingerprint import Fingerprint
from cachekit.for_model import ForModel
from cachekit.json_files import FROZEN, ReuseSpec, SegmentSpec, Where, read_model
from cachekit.policies.planned import planned
from cachekit.preset import Preset


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
