"""The whole prediction as a site: no block is run on a reused step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cachekit.call import GraphChanged
from cachekit.decisions import Decisions
from cachekit.errors import ConfigError
from cachekit.graph import has_signature, signature
from cachekit.tree import replaced, tensors, without_tensors

VISIT = -1


def store_prediction(decisions: Decisions, k: int, result: Any, sample: Tensor | None) -> None:
    """Keep a model's result; with a residual, less its share of the sample.

    Raises:
        ConfigError: no tensor can be seen in it; or a residual is asked for, and there is no sample, or the prediction has another
            shape.
        GraphChanged: what is stored has another shape, dtype or device.
    """
    beta = decisions.sites[k].reuse.beta
    if beta and sample is None:
        raise ConfigError(
            "a residual of the whole prediction is what it differs from the sample by, and this model takes none beside its "
            "timestep; use reuse='output' or 'taylor-K', or another segment"
        )
    predicted = list(tensors(result))
    if not predicted:
        raise ConfigError(
            f"the model returned {type(result).__name__}, in which no tensor can be seen; return a tensor, or a tuple, list, dict "
            "or dataclass of them, or reuse another segment than the whole prediction"
        )
    for path, tensor in predicted:
        if beta and sample is not None and sample.shape != tensor.shape:
            raise ConfigError(
                f"a residual of the whole prediction needs one of the sample's shape {tuple(sample.shape)}, "
                f"and this model's is {tuple(tensor.shape)}; use reuse='output' or 'taylor-K', or another segment"
            )
        stored = decisions.newest(k, VISIT, path)
        if stored is not None and not has_signature(stored, signature(tensor)):
            raise GraphChanged("another shape, dtype or device")
        # A model in half precision may be given samples in single precision: what is stored has the prediction's dtype.
        decisions.keep(k, VISIT, path, tensor, sample.to(tensor) if beta and sample is not None else None)
    decisions.branch.structure = without_tensors(result)
    decisions.branch.ready.add(k)
    decisions.made[k] = True


def whole_prediction(decisions: Decisions, k: int) -> Any:
    """What the model returns on a reused step."""
    branch = decisions.branch
    sample = branch.inputs.sample if decisions.sites[k].reuse.beta else None
    sampled = branch.sampled.store if branch.sampled is not None else {}
    paths = [path for site, v, path in (*branch.store, *sampled) if site == k and v == VISIT]
    return replaced(branch.structure, {path: decisions.forecast(k, VISIT, path, sample) for path in paths})
