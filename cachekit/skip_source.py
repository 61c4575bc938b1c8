"""Where long skip connections are read from, and whether they belong to a model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.adapter import adapter_for
from cachekit.errors import ConfigError, ModelError
from cachekit.long_skips import PREFIX
from cachekit.pairs import stack_units

FORMAT = "cachekit long skips 1"


def read_source(source: Any) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """A source's tensors, and the metadata of a file of our own."""
    if isinstance(source, Mapping):
        state = dict(source)
    elif Path(source).suffix == ".safetensors":
        with load_safetensors().safe_open(os.fspath(source), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        return state, metadata if metadata.get("format") == FORMAT else None
    else:
        state = torch.load(source, map_location="cpu", weights_only=True)
    nested = [key for key, value in state.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"this is no state dict but holds some ({', '.join(map(repr, nested))}); give one of them, such as state['ema']"
        )
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}, None


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one base model from another: class, depth, and a digest of the parameters' names and shapes."""
    shapes = [(name, tuple(value.shape)) for name, value in model.named_parameters() if not name.startswith(PREFIX)]
    digest = hashlib.sha256(json.dumps(sorted(shapes)).encode()).hexdigest()
    depth = sum(len(unit) for unit in stack_units(model, adapter_for(model)))
    return {"class": type(model).__name__, "blocks": depth, "parameters": digest}


def check_fingerprint(model: nn.Module, theirs: dict[str, Any]) -> None:
    """Compare a model with the one of a file.

    Raises:
        ModelError: it is another one.
    """
    ours = fingerprint(model)
    if ours == theirs:
        return
    other = [f"{key} {theirs.get(key)}, here {ours[key]}" for key in ("class", "blocks") if theirs.get(key) != ours[key]]
    what = "; ".join(other) or "other names or shapes of parameters"
    raise ModelError(f"these long skip connections were made for another model ({what}); build the model that they were saved from")


def check_keys(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Compare keys and shapes.

    Raises:
        ModelError: they differ.
    """
    wrong = {
        "missing": [key for key in wanted if key not in given],
        "unknown": [key for key in given if key not in wanted],
        "of another shape": [key for key in wanted if key in given and wanted[key].shape != given[key].shape],
    }
    said = [
        f"{kind}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for kind, keys in wrong.items()
        if keys
    ]
    if said:
        raise ModelError(f"these {what} are of another model ({'; '.join(said)}); build the model that they belong to")


def load_safetensors() -> Any:
    """The module ``safetensors.torch``, which only files need.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise ConfigError("long skip connections are kept in safetensors files; pip install safetensors") from None
    return safetensors.torch
