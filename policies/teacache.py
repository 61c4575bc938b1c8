"""TeaCache, "teacache-0.2"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from pydantic import Field, NonNegativeFloat, validate_call
from torch import nn

from cachekit.adapter import Adapter
from cachekit.errors import ConfigError
from cachekit.for_model import ForModel, by_class
from cachekit.policies.accumulated import accumulated
from cachekit.policies.first import first
from cachekit.policies.last import last
from cachekit.preset import Preset

Coefficients = Annotated[tuple[float, ...], Field(min_length=1)]

# Highest power first, from ali-vilab/TeaCache: TeaCache4FLUX (FLUX.1-dev), TeaCache4HunyuanVideo, the paper's Latte,
# TeaCache4Mochi, TeaCache4LTX-Video. Those of its models that watch a time embedding instead of the modulated input (CogVideoX,
# Wan, HiDream) are not among them.
_FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
_HUNYUAN = (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)
_LATTE = (-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402)
_MOCHI = (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719)
_LTX = (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326)
PUBLISHED: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "FluxTransformer2DModel": _FLUX,
        "HunyuanVideoTransformer3DModel": _HUNYUAN,
        "HYVideoDiffusionTransformer": _HUNYUAN,
        "LatteTransformer3DModel": _LATTE,
        "LatteT2V": _LATTE,
        "MochiTransformer3DModel": _MOCHI,
        "LTXVideoTransformer3DModel": _LTX,
    }
)


@dataclass(frozen=True)
class _Published(ForModel):
    threshold: float

    def for_model(self, model: nn.Module, adapter: Adapter) -> Preset:
        found = by_class(model, PUBLISHED)
        if found is None:
            raise ConfigError(
                f"no published TeaCache polynomial is known for {type(model).__name__} (known: {', '.join(PUBLISHED)}); fit one "
                f"to this model: write teacache-{self.threshold}:FILE with the file of cachekit.calibrate(...).save(FILE), or "
                f"cachekit.policies.teacache({self.threshold}, coefficients=(...)), where (1, 0) is no polynomial at all"
            )
        return teacache(self.threshold, coefficients=found)


@validate_call
def teacache(threshold: NonNegativeFloat = 0.2, *, coefficients: Coefficients | None = None) -> Preset:
    """Reuse the stack's residual while the first block's modulated input has changed little, added up (TeaCache, arXiv 2411.19108).

    ``accumulated(threshold)`` with a polynomial that estimates the change of the output from that of the input; the first and the
    last step are full (the last needs ``model.cachekit.session(steps=...)``; stats say where it was off).

    Args:
        threshold: of the accumulated change; 0.2 to 0.6 in the paper, each model has its own.
        coefficients: of the polynomial, highest power first; None takes the published ones for the class of the model that is
            wrapped, and ``wrap`` raises ``ConfigError`` where there are none.
    """
    if coefficients is None:
        return _Published(threshold)
    policy = first(1) | last(1) | accumulated(threshold, coefficients=coefficients, pooled=True)
    return Preset(policy, segments="all", reuse="residual")
