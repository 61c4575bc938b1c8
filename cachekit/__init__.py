"""Skip what a diffusion transformer computes twice: ``model = cachekit.wrap(model, policy="skip-every-2")``."""

from cachekit import policies
from cachekit.adapter import Adapter
from cachekit.amplification import Amplification
from cachekit.anatomy import graph
from cachekit.calibrate import calibrate
from cachekit.calibration import Calibration
from cachekit.check import check
from cachekit.disturb import measure_amplification
from cachekit.errors import CachekitError, ConfigError, ModelError
from cachekit.findings import Finding, Report
from cachekit.for_model import ForModel
from cachekit.front import Budget, Front
from cachekit.graph import Cost, Graph, Visit
from cachekit.long_skips import add_long_skips, remove_long_skips
from cachekit.plan_file import Plan
from cachekit.policy import Policy, Step
from cachekit.preset import Preset
from cachekit.retrofit import retrofit
from cachekit.reuse import Forecast, Reuse
from cachekit.schedule import Schedule, plan
from cachekit.search import search
from cachekit.segments import Segment
from cachekit.signals import Comparison, Signal
from cachekit.skip_files import load_long_skips, save_long_skips
from cachekit.stages import Distillation, Stage
from cachekit.stats import Audit, Record, SiteAudit, Stats
from cachekit.wrap import Handle, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Amplification",
    "Audit",
    "Budget",
    "CachekitError",
    "Calibration",
    "Comparison",
    "ConfigError",
    "Cost",
    "Distillation",
    "Finding",
    "ForModel",
    "Forecast",
    "Front",
    "Graph",
    "Handle",
    "ModelError",
    "Plan",
    "Policy",
    "Preset",
    "Record",
    "Report",
    "Reuse",
    "Schedule",
    "Segment",
    "Signal",
    "SiteAudit",
    "Stage",
    "Stats",
    "Step",
    "Visit",
    "add_long_skips",
    "calibrate",
    "check",
    "graph",
    "load_long_skips",
    "measure_amplification",
    "plan",
    "policies",
    "remove_long_skips",
    "retrofit",
    "save_long_skips",
    "search",
    "unwrap",
    "wrap",
]
