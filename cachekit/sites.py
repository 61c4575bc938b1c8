"""What ``wrap`` is told about where, when and how to reuse, as sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cachekit.errors import ConfigError
from cachekit.preset import Preset, settled
from cachekit.refresh import check, refreshes
from cachekit.reuse import parse_reuse
from cachekit.segments import Site, parse_segments
from cachekit.signals import INSIDE, LACKING


def sites(read: Callable[[Any], Preset], policy: Preset, segments: Any, reuse: Any) -> tuple[Site, ...]:
    """What is decided on: each segment with its policy and reuse.

    Args:
        read: makes a preset for this model of what a segment or ``wrap`` was given as a policy.
        policy, segments, reuse: as given to ``wrap``.

    Raises:
        ConfigError: what can't be read, or can't go together.
    """
    preset = read(policy)
    default_reuse = reuse if reuse is not None else preset.reuse
    made = []
    for segment in parse_segments(segments if segments is not None else settled(preset.segments)):
        own = preset if segment.policy is None else read(segment.policy)
        chosen = next((r for r in (segment.reuse, reuse, own.reuse, default_reuse) if r is not None), "output")
        site = Site(segment, own.policy, parse_reuse(settled(chosen)))
        check(site)
        looked_at = {signal.of for signal in site.signals}
        for of in sorted(INSIDE & looked_at if segment.is_model else ()):
            raise ConfigError(LACKING[of])
        made.append(site)
    if sum(site.segment.is_model for site in made) > 1:
        raise ConfigError("segments name the whole prediction ('model', or 'uncond' of it) twice; once is enough")
    return tuple(made)


def passes(per_sample: bool | int, sites: tuple[Site, ...], audit_every: int | None) -> int:
    """How many rows of a batch in a row of its length belong to each sample; 0 for one decision for the batch.

    Raises:
        ConfigError: no such number, or what can't be decided for each sample.
    """
    if not isinstance(per_sample, int) or per_sample < 0:
        raise ConfigError(
            f"per_sample={per_sample!r}: write True, False, or how many passes of each sample are in one batch (2 for guidance)"
        )
    if per_sample and len(sites) > 1 and any(site.segment.is_model for site in sites):
        raise ConfigError("per_sample: decide on segments='model' for each sample, or on segments of blocks, not on both at once")
    if per_sample and (audit_every is not None or any("estimate" in site.policy.required() for site in sites)):
        raise ConfigError(
            "per_sample: audits and estimates of the error are made for a whole batch; leave per_sample out, or audit_every and "
            "the policy that reads step.estimate"
        )
    if per_sample and any(refreshes(site.reuse) for site in sites):
        raise ConfigError("per_sample: tokens are recomputed for a whole batch; leave per_sample out, or take another reuse")
    return int(per_sample)
