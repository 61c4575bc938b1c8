"""Where long skip connections are read from, and whether they belong to a model."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.adapter import adapter_for
from cachekit.errors import ConfigError, ModelError
from cachekit.long_skips import PREFIX
from cachekit.pairs import stack_units

FORMAT = "cachekit long skips 1"


# Where the trainings of Skip-DiT's authors keep a state dict, in the order in which their samplers look (arXiv 2411.17616).
NESTED = ("ema", "model")
# What DistributedDataParallel and torch.compile put before every key.
WRAPPERS = ("module.", "_orig_mod.")


def read_source(source: Any) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """A source's tensors, and the metadata of a file of our own.

    Raises:
        ConfigError: it can't be read, or is no state dict and holds none that is known.
    """
    if isinstance(source, Mapping):
        return _flat(source), None
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"source={type(source).__name__}: give a file's path, or a state dict")
    path = Path(source)
    if not _is_safetensors(path):
        return _flat(_unpickled(path)), None
    open_file = load_safetensors().safe_open
    try:
        with open_file(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except Exception as error:
        raise ConfigError(f"{str(path)!r} can't be read ({error}); give another path") from error
    return state, metadata if metadata.get("format") == FORMAT else None


def _is_safetensors(path: Path) -> bool:
    """By its beginning, since one of our own may have any name: the header's length in eight bytes, then the header, in JSON.

    Raises:
        ConfigError: there is nothing to read.
    """
    if path.suffix == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise ConfigError(f"{str(path)!r} can't be read ({error}); give another path") from error


def _unpickled(path: Path) -> Any:
    # Trainings keep their command line beside the weights. Before torch 2.5 it can't be allowed for one call alone.
    allowed = getattr(torch.serialization, "safe_globals", None)
    try:
        with nullcontext() if allowed is None else allowed([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # An empty file's error says nothing.
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"{str(path)!r} can't be read as weights alone ({said}); if you trust it, "
            "torch.load(path, weights_only=False) it yourself, and give the state dict in it, such as its 'ema'"
        ) from error


def _flat(given: Any) -> dict[str, Tensor]:
    """A state dict, or the one that a training's checkpoint holds."""
    state = given
    if isinstance(given, Mapping):
        state = next((given[name] for name in NESTED if isinstance(given.get(name), Mapping)), given)
    if not isinstance(state, Mapping):
        raise ConfigError(f"it holds a {type(state).__name__}; give a state dict, or a file with one")
    nested = [key for key, value in state.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"this is no state dict but holds some ({', '.join(map(repr, nested))}); give one of them, such as state[{nested[0]!r}]"
        )
    found = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    while found and (wrapper := next((name for name in WRAPPERS if all(key.startswith(name) for key in found)), None)):
        found = {key.removeprefix(wrapper): value for key, value in found.items()}
    return found


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one base model from another: class, depth, and a digest of the parameters' names and shapes."""
    shapes = [(name, tuple(value.shape)) for name, value in model.named_parameters() if not name.startswith(PREFIX)]
    digest = hashlib.sha256(json.dumps(sorted(shapes)).encode()).hexdigest()
    depth = sum(len(unit) for unit in stack_units(model, adapter_for(model)))
    return {"class": _own_class(model).__name__, "blocks": depth, "parameters": digest}


def _own_class(model: nn.Module) -> type:
    """Without the one that torch puts in its place where it shards a model (``fully_shard``)."""
    bases = [base for base in type(model).__mro__ if issubclass(base, nn.Module) and not base.__module__.startswith("torch.")]
    return bases[0] if bases else type(model)


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
