"""Pyramid Attention Broadcast, "pab"."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt, validate_call
from pydantic.dataclasses import dataclass

from cachekit.errors import ConfigError
from cachekit.policy import STRICT, Policy, Step
from cachekit.preset import Preset
from cachekit.segments import Segment


@dataclass(frozen=True, config=STRICT)
class broadcast(Policy[None]):
    """Recompute every n-th step, and wherever t is not within close < t < start (PAB, arXiv 2408.12588).

    Raises:
        ConfigError: an empty window.
    """

    n: PositiveInt
    start: NonNegativeFloat = 800.0
    close: Annotated[float, Field(ge=-1)] = 100.0

    def __post_init__(self) -> None:
        if self.close >= self.start:
            raise ConfigError(f"window ({self.start:g}, {self.close:g}): t falls, so that the first of the two is the larger one")

    def decide(self, state: None, step: Step) -> bool:
        return step.i % self.n == 0 or not self.close < step.t < self.start


@validate_call
def pab(
    spatial: PositiveInt = 2,
    temporal: PositiveInt = 3,
    cross: PositiveInt = 6,
    start: NonNegativeFloat = 800.0,
    close: NonNegativeFloat = 100.0,
) -> Preset:
    """Attention over space, over time and to the prompt each with a period of its own, within a window (PAB, arXiv 2408.12588).

    As diffusers' ``PyramidAttentionBroadcastConfig``. Where an adapter names no blocks over time, all self-attention is spatial
    (CogVideoX, HunyuanVideo, Wan). Everything else runs on every step; the authors' option to reuse MLPs is not there. Holds one
    tensor for each attention and output.

    Args:
        spatial, temporal, cross: periods. The defaults are the authors' for Latte, for Open-Sora they have ``"pab-2-4-6-930-450"``.
        start, close: of the window, in the scheduler's units; neither end is in it.
    """
    kinds = {"spatial_attn": spatial, "temporal_attn": temporal, "cross_attn": cross}
    segments = [Segment(modules=kind, policy=broadcast(n, start, close)) for kind, n in kinds.items()]
    return Preset(broadcast(spatial, start, close), segments=segments, reuse="output")
