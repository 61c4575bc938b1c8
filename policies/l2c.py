"""Learning-to-Cache, from a file of learned masks."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import torch
from pydantic import Field, validate_call
from torch import Tensor

from cachekit.errors import ConfigError
from cachekit.policies.scheduled import scheduled
from cachekit.preset import Preset


@validate_call
def l2c(file: Path, threshold: Annotated[float, Field(ge=0, le=1)] = 0.1) -> Preset:
    """Each attention and MLP at the steps at which a trained router lets it run (Learning-to-Cache, arXiv 2406.01733).

    Args:
        file: the authors' router (``DDIM50_router.pt``: for each step, from the last to the first, a logit for each block's
            attention and MLP in turn), or JSON of masks as ``scheduled`` takes them.
        threshold: a module runs where the sigmoid of its logit is larger; 0.1 in the authors' examples. JSON has none.

    Raises:
        ConfigError: a file that can't be read as either.
    """
    if file.suffix == ".json":
        masks = _read(file, lambda: json.loads(file.read_text()))
        if not isinstance(masks, dict):
            raise ConfigError(f"{file} holds no object of masks; see cachekit.policies.scheduled")
        return scheduled(masks)
    return scheduled(_masks(file, threshold))


def _read(file: Path, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ConfigError(f"{file} can't be read: {error}; give the authors' router (.pt), or JSON of masks") from error


def _masks(file: Path, threshold: float) -> dict[str, list[bool]]:
    """The marks of each block's attention and MLP. In the authors' sampler every other step is full, whatever its router says."""
    state = _read(file, lambda: torch.load(file, map_location="cpu", weights_only=True))
    routers = state.get("routers") if isinstance(state, dict) else None
    if not isinstance(routers, dict) or not all(isinstance(value, Tensor) for value in routers.values()):
        raise ConfigError(f"{file} holds no 'routers'; give a router of the authors' DiT, or JSON of masks")
    try:
        logits = [routers[f"{index}.prob"] for index in reversed(range(len(routers)))]
    except KeyError as missing:
        raise ConfigError(f"{file} lacks the router {missing}; give a router of the authors' DiT, or JSON of masks") from None
    steps = len(logits)
    runs = [
        [(steps - 1 - i) % 2 == 1 or bool(run) for run in (logit.sigmoid() > threshold).tolist()] for i, logit in enumerate(logits)
    ]
    return {f"{'mlp' if k % 2 else 'attn'}-{k // 2}": [row[k] for row in runs] for k in range(len(runs[0]))}
