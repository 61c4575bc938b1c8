"""What a calibration found, and what follows from it for thresholds and fitted methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, NonNegativeFloat

from cachekit.errors import ConfigError
from cachekit.fingerprint import Fingerprint
from cachekit.json_files import FROZEN, SegmentSpec, Where, read_model, segment_specs
from cachekit.measures import Matrix

Row = tuple[float | None, ...]
Table = tuple[tuple[float, ...], ...]

LOOKAHEAD = 3


class SiteRecord(BaseModel):
    """What reuse of one site costs, at each of n timesteps.

    Attributes:
        segments: the site.
        gram: (n, n) inner products of its values at every two timesteps, over all that it stores, mean of the runs.
        probes: orders of the forecasts by which it was reused at one timestep alone.
        response: (p n, p n) inner products of the relative errors of the final samples there, all timesteps of the first probe
            before those of the second: on the diagonal is what each costs. Zeros for what there are too few values for.
        lookahead: (3, n) relative L1 errors of holding its value for one to three steps from each, mean over all that it stores
            and the runs; None where that is past the end.
        change, front_change: what the policies of these names see from each timestep to the next; empty where there is nothing
            to look at.
        blocks: share of the blocks that still run on a reused step.
    """

    model_config = FROZEN

    segments: tuple[SegmentSpec, ...]
    gram: Table
    probes: tuple[int, ...] = (1,)
    response: Table
    lookahead: tuple[Row, ...]
    change: Row = ()
    front_change: Row = ()
    blocks: NonNegativeFloat = 0.0


class Calibration(BaseModel):
    """What ``calibrate`` recorded of one model with one sampler. Save it, and fit policies and search plans from it.

    Attributes:
        model: what it is of.
        timesteps: the different timesteps of a generation, n of them.
        runs: numbers of the runs.
        sites: by the name that they were asked for with.
        ratios: (n,) mean ratio of the norms of the stack's residual at each timestep and the one before, the first 1.
        input_changes, output_changes: (m,) relative L1 change of what enters the first block's attention from one step to the
            next, and of the prediction, pairs of all runs and branches. Empty where no attention was found.
    """

    model_config = FROZEN

    format: Literal["cachekit calibration 1"] = "cachekit calibration 1"
    model: Fingerprint
    timesteps: tuple[float, ...] = Field(min_length=2)
    runs: tuple[int, ...] = Field(min_length=1)
    sites: dict[str, SiteRecord]
    ratios: tuple[float, ...] = ()
    input_changes: tuple[float, ...] = ()
    output_changes: tuple[float, ...] = ()

    def save(self, path: Where) -> None:
        """Write it as JSON."""
        Path(path).write_text(self.model_dump_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Where) -> Calibration:
        """Read a file of ``save``.

        Raises:
            ConfigError: there is none, or it is no calibration.
        """
        found: Calibration = read_model(cls, path, "calibration", "cachekit.calibrate")
        return found

    def site(self, name: str) -> SiteRecord:
        """What was recorded of a site.

        Raises:
            ConfigError: it was not calibrated.
        """
        if name not in self.sites:
            raise ConfigError(f"site {name!r} was not calibrated, only {', '.join(map(repr, self.sites))}; name it in sites=")
        return self.sites[name]

    def find(self, segments: Any) -> SiteRecord:
        """The site of these segments, however they are written.

        Raises:
            ConfigError: it was not calibrated.
        """
        wanted = segment_specs(segments)
        found = next((record for record in self.sites.values() if record.segments == wanted), None)
        return found if found is not None else self.site(str(segments))

    def threshold(self, signal: str, percentile: float, site: str = "middle") -> float:
        """A threshold as a percentile of what the policy's signal was from one step to the next.

        Args:
            signal: ``"change"`` or ``"front-change"`` of a site with blocks before it; ``"input"`` (what enters the first
                block's attention), ``"output"`` (the prediction) or ``"estimate"`` (the output's change as ``change_polynomial``
                estimates it from the input's, 0 where that is negative) of the whole model.
            percentile: 0 to 100; reuse gets more likely with it.
            site: name of the site, for the first two.

        Returns:
            The percentile over all steps but the first, of the runs' mean for the first two, of all runs for the others.

        Raises:
            ConfigError: another signal, one that was not to be seen, or a percentile outside 0 ... 100.
        """
        if not 0 <= percentile <= 100:
            raise ConfigError(f"percentile={percentile}: give one of 0 ... 100")
        seen = self._signal(signal, site)
        if not seen:
            raise ConfigError(f"signal {signal!r} was not to be seen in this calibration (site {site!r}); take another site")
        return float(np.percentile(seen, percentile))

    def _signal(self, signal: str, site: str) -> list[float]:
        if signal in ("change", "front-change"):
            record = self.site(site)
            row = record.change if signal == "change" else record.front_change
            return [value for value in row if value is not None]
        if signal == "estimate":
            return [max(0.0, float(value)) for value in np.polyval(self.change_polynomial(), self.input_changes)]
        if signal not in ("input", "output"):
            raise ConfigError(f"unknown signal {signal!r}; write 'change', 'front-change', 'input', 'output' or 'estimate'")
        return list(self.input_changes if signal == "input" else self.output_changes)

    def change_polynomial(self, degree: int = 4) -> tuple[float, ...]:
        """Coefficients, highest power first: least squares of the output's change over the input's (arXiv 2411.19108).

        Raises:
            ConfigError: there are not enough pairs for it.
        """
        if len(self.input_changes) <= degree:
            raise ConfigError(
                f"{len(self.input_changes)} pairs of changes don't determine a polynomial of degree {degree}; calibrate with more "
                "steps or runs (a model without attention in its blocks has none)"
            )
        return tuple(float(c) for c in np.polyfit(self.input_changes, self.output_changes, degree))


def matrix(table: Sequence[Sequence[float | None]]) -> Matrix:
    """A table of a file as an array; NaN where there is nothing."""
    return np.array([[np.nan if value is None else value for value in row] for row in table], dtype=np.float64)


def row(values: Matrix) -> Row:
    """An array as a file keeps it; None where there is nothing."""
    return tuple(None if np.isnan(value) else float(value) for value in values)
