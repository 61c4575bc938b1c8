"""SmoothCache, "smoothcache-0.1:calibration.json"."""

from __future__ import annotations

from dataclasses import replace

from cachekit.calibration import Calibration, Row
from cachekit.errors import ConfigError
from cachekit.policies.every import every
from cachekit.policies.planned import planned
from cachekit.preset import Preset
from cachekit.segments import Segment


def greedy(curve: tuple[Row, ...], alpha: float) -> tuple[int, ...]:
    """The steps that SmoothCache recomputes.

    From each recompute on it reuses as long as the error of what it holds stays under a threshold, and at most as far as the
    curve looks ahead.

    Args:
        curve: (lookahead, n), in row k - 1 and column i the relative L1 error of holding the value of step i for k steps, None
            past the end.
        alpha: the threshold.

    Returns:
        Indices of the steps, rising, 0 first.
    """
    found, i, n = list[int](), 0, len(curve[0])
    while i < n:
        found.append(i)
        held = 0
        while held < len(curve) and (error := curve[held][i]) is not None and error < alpha:
            held += 1
        i += held + 1
    return tuple(found)


def smoothcache(calibration: Calibration, alpha: float = 0.1, sites: tuple[str, ...] | None = None) -> Preset:
    """Hold each kind of module for as long as its calibrated error stays under a threshold (SmoothCache, arXiv 2411.10510, eq. 4).

    Args:
        calibration: of this model and sampler (``"smoothcache-0.1:FILE"`` checks that), with sites such as ``"attn"`` and
            ``"mlp"``, each of which gets a schedule of its own. Its errors are means over the modules and the runs.
        alpha: the threshold of the relative L1 error; the authors' are 0.08 to 0.35, each model has its own.
        sites: names of the calibration's sites; all that are modules unless given.

    Raises:
        ConfigError: the calibration has no such sites.
    """
    modules = tuple(name for name, record in calibration.sites.items() if all(spec.modules for spec in record.segments))
    chosen = modules if sites is None else sites
    if not chosen:
        raise ConfigError(
            f"SmoothCache holds modules, and the calibration has none, only {', '.join(map(repr, calibration.sites))}; "
            "cachekit.calibrate(..., sites=('attn', 'mlp')), with 'cross_attn' where there is any, or name others in sites="
        )
    segments: list[Segment] = []
    for name in chosen:
        record = calibration.site(name)
        policy = planned(greedy(record.lookahead, alpha), calibration.timesteps)
        segments += [replace(spec.segment(), policy=policy) for spec in record.segments]
    return Preset(every(1), segments=segments, reuse="output")
