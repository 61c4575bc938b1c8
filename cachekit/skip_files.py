"""Save long skip connections, and load them: cachekit's own files, state dicts, and the paper's released checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from cachekit.adapter import Adapter, adapter_for
from cachekit.connections import LongSkips
from cachekit.errors import ConfigError, ModelError
from cachekit.fusions import FUSIONS
from cachekit.long_skips import PREFIX, check_module, connect_long_skips, long_skips_of, make_long_skips
from cachekit.pairs import Pairs, default_pairs, stack_units
from cachekit.skip_source import FORMAT, check_fingerprint, check_keys, fingerprint, load_safetensors, read_source

M = TypeVar("M", bound=nn.Module)


def save_long_skips(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's long skip connections, and nothing else of it, to a safetensors file.

    Beside the weights it holds the fusion's name, the pairs, and a fingerprint of the model that they belong to. Of a model
    that is sharded over processes (``fully_shard``) each must call it, with a path of its own.

    Raises:
        ModelError: the model has none.
        ConfigError: safetensors is not installed, or the file can't be written.
    """
    found = long_skips_of(model)
    if found is None:
        raise ModelError("the model has no long skip connections to save; cachekit.add_long_skips(model) first")
    state = {f"{PREFIX}{key}": _whole(value).detach().cpu().contiguous().clone() for key, value in found.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "fusion": found.fusion,
        "pairs": json.dumps(found.pairs),
        "blocks": json.dumps(_joined(found)),
        "widths": json.dumps([connection.width for connection in found.connections]),
        "model": json.dumps(fingerprint(model)),
    }
    safetensors = load_safetensors()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        safetensors.save_file(state, os.fspath(path), metadata)
    except Exception as error:
        raise ConfigError(f"{os.fspath(path)!r} can't be written ({error}); give the path of a file") from error


def _joined(long_skips: LongSkips) -> list[list[str]]:
    return [[connection.early, connection.late] for connection in long_skips.connections]


def _whole(value: Tensor) -> Tensor:
    gathered: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered


def load_long_skips(model: M, source: str | os.PathLike[str] | Mapping[str, Tensor], *, adapter: Adapter | str | None = None) -> M:
    """Load long skip connections, and add them to the model where they are not there yet.

    Args:
        model: the model that they were made for; changed in place.
        source: a file of ``save_long_skips``; a state dict with keys ``long_skips.*`` (of a model that has them already); or a
            whole checkpoint of Skip-DiT's authors (arXiv 2411.17616), as a file or a state dict, whose base weights are loaded
            as well, into their own classes or diffusers'. Of a training's checkpoint it is "ema", else "model".
        adapter: as in ``wrap``.

    Returns:
        The same model.

    Raises:
        ModelError: it belongs to another model; nothing is changed then.
        ConfigError: a file that can't be read, or one or a state dict that holds no long skip connections, or others than the
            model's.
    """
    from cachekit.adapters import read_released

    check_module(model)
    state, metadata = read_source(source)
    released = read_released(state)
    if released is not None:
        return _load_released(model, *released, adapter_for(model, adapter))
    own = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    if not own:
        raise ConfigError(f"there are no long skip connections in it: no key begins with {PREFIX!r} or 'skip_linears.'")
    if metadata is not None:
        check_fingerprint(model, json.loads(metadata["model"]))
        return _load_own(model, own, metadata, adapter)
    found = long_skips_of(model)
    if found is None:
        raise ConfigError(
            "a state dict doesn't say how its long skip connections fuse; cachekit.add_long_skips(model, fusion=...) first, "
            "or load a file of cachekit.save_long_skips"
        )
    return _load(model, own, found.fusion, found.pairs, adapter)


def _load_own(model: M, own: dict[str, Tensor], metadata: Mapping[str, str], adapter: Adapter | str | None) -> M:
    if lacking := {"fusion", "pairs", "blocks", "widths"} - metadata.keys():
        raise ConfigError(f"the file doesn't say its {' and '.join(sorted(lacking))}; write it with this version's save_long_skips")
    pairs = tuple((early, late) for early, late in json.loads(metadata["pairs"]))
    widths = set(json.loads(metadata["widths"]))
    return _load(
        model,
        own,
        metadata["fusion"],
        pairs,
        adapter,
        width=widths.pop() if len(widths) == 1 else None,
        blocks=json.loads(metadata["blocks"]),
    )


def _load(
    model: M,
    own: dict[str, Tensor],
    fusion: str,
    pairs: Pairs,
    adapter: Adapter | str | None,
    *,
    width: int | None = None,
    blocks: list[list[str]] | None = None,
) -> M:
    found = long_skips_of(model)
    if found is not None and (found.fusion, found.pairs) != (fusion, pairs):
        raise ConfigError(
            f"the model has other long skip connections ({found.fusion}, pairs {found.pairs}) than what is loaded ({fusion}, pairs "
            f"{pairs}); cachekit.remove_long_skips(model) first"
        )
    if found is None and fusion not in FUSIONS:
        raise ConfigError(
            f"the file's fusion is {fusion!r}, which cachekit can't make; cachekit.add_long_skips(model, fusion=..., "
            f"pairs={list(pairs)}) with your own first"
        )
    # Nothing of the initialisation stays, so that it must not draw from the global generator.
    made = make_long_skips(model, fusion, pairs, 0, width, adapter) if found is None else found
    differing = next((both for both in zip(blocks or [], _joined(made), strict=False) if both[0] != both[1]), None)
    if differing is not None:
        theirs, ours = (" to ".join(each) for each in differing)
        raise ConfigError(
            f"they lead from {theirs}, and with this adapter from {ours}; give the adapter= that they were added with"
        )
    check_keys(made.state_dict(), own, "long skip connections")
    made.load_state_dict(own)
    return connect_long_skips(model, made) if found is None else model


def _load_released(model: M, base: dict[str, Tensor], fusions: list[dict[str, Tensor]], adapter: Adapter) -> M:
    from cachekit.adapters import released_pair

    units = len(stack_units(model, adapter))
    if len(fusions) != units // 2:
        raise ModelError(
            f"the checkpoint has {len(fusions)} long skip connections, and this model's {units} blocks make {units // 2}"
        )
    own = {}
    for k, fusion in enumerate(fusions):
        early, late = released_pair(k, units)
        own.update({f"{early}_to_{late}.{key}": value for key, value in fusion.items()})
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(PREFIX)}
    fitted = _fitted(base, wanted, adapter) if base else {}
    _load(model, own, "paper", default_pairs(units), adapter)
    model.load_state_dict(fitted, strict=False)
    return model


def _fitted(base: dict[str, Tensor], wanted: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """A checkpoint's base weights under the model's names."""
    if adapter.translate is not None and not wanted.keys() <= base.keys():
        base = adapter.translate(base)
    kept = {key: value for key, value in base.items() if key in wanted or not any(fnmatch(key, glob) for glob in adapter.unneeded)}
    check_keys(wanted, kept, "weights")
    return kept
