"""Skip what a diffusion transformer computes twice: ``model = cachekit.wrap(model, policy="skip-every-2")``."""

from cachekit import policies
from cachekit.adapter import Adapter
from cachekit.errors import CachekitError, ConfigError, ModelError
from cachekit.policy import Policy, Preset, Step
from cachekit.reuse import Forecast, Reuse
from cachekit.schedule import Schedule, plan
from cachekit.segments import Segment
from cachekit.stats import Record, Stats
from cachekit.wrap import Handle, unwrap, wrap

__all__ = [
    "Adapter",
    "CachekitError",
    "ConfigError",
    "Forecast",
    "Handle",
    "ModelError",
    "Policy",
    "Preset",
    "Record",
    "Reuse",
    "Schedule",
    "Segment",
    "Stats",
    "Step",
    "plan",
    "policies",
    "unwrap",
    "wrap",
]
