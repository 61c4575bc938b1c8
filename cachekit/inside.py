"""Find the modules within a block that can be sites of their own: attention, cross-attention and MLP."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cachekit.adapter import Adapter
from cachekit.tree import Path, arguments, tensors

ATTENTION, CROSS, MLP = "attn", "cross_attn", "mlp"
KINDS = (ATTENTION, CROSS, MLP)
# Name in ``segments=`` -> the kind, and whether it is that of blocks over time (None: of all).
MODULES: dict[str, tuple[str, bool | None]] = {
    ATTENTION: (ATTENTION, None),
    CROSS: (CROSS, None),
    MLP: (MLP, None),
    "spatial_attn": (ATTENTION, False),
    "temporal_attn": (ATTENTION, True),
}

_ATTENTION_NAME = re.compile(r".*att(n|ention)\d*", re.IGNORECASE)
_NORM_NAME = re.compile(r".*norm.*|.*modulation.*|.*ada_?ln.*", re.IGNORECASE)
# Arguments that may have a sequence's shape and are none: what masks the tokens, and where they stand.
_NO_SEQUENCE = re.compile(r".*(mask|bias|rotary|rope|freq|pos|emb$|temb|cos|sin|norm).*", re.IGNORECASE)


# Whether a module of this name is looked for.
Wanted = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Role:
    """What a module within a block is, before it has been called.

    Attributes:
        kind: one of ``KINDS``, where an adapter says it; ``"attn"`` and ``"mlp"`` where it was guessed.
        certain: an adapter says it. A guess is judged by what the module takes and returns.
        temporal: its block attends over time, as an adapter says.
    """

    kind: str
    certain: bool
    temporal: bool


def covers(names: tuple[str, ...], kind: str | None, temporal: bool) -> bool:
    """Whether a module of this kind, in such a block, is among those that these names of ``segments=`` stand for."""
    return any(kind == wanted and over_time in (None, temporal) for wanted, over_time in (MODULES[name] for name in names))


def find_modules(path: str, block: nn.Module, adapter: Adapter) -> dict[str, tuple[nn.Module, Role]]:
    """A block's modules that may be sites, by their path within it.

    By the adapter's names where it gives any; else by the usual names, and in blocks that have none of those by class and
    shape: what is called attention and has layers, and what has layers that lead from a width back to it.

    Args:
        path: of the block in the model.
    """
    temporal = adapter.temporal is not None and re.fullmatch(adapter.temporal, path) is not None
    given = adapter.model_fields_set
    attention = {**dict.fromkeys(adapter.attention, ATTENTION), **dict.fromkeys(adapter.cross_attention, CROSS)}
    certain = bool({"attention", "cross_attention"} & given)
    found = _roles(block, attention, certain, temporal, None if certain else _is_attention)
    certain = "mlp" in given
    mlp = dict.fromkeys(adapter.mlp, MLP)
    return {**_roles(block, mlp, certain, temporal, None if certain else _is_mlp), **found}


def _roles(
    block: nn.Module, names: dict[str, str], certain: bool, temporal: bool, looks_like: Wanted | None
) -> dict[str, tuple[nn.Module, Role]]:
    """The modules of these names and kinds; where there are none, those that look like one."""
    named = {
        path: (module, Role(names[_last(path)], certain, temporal)) for path, module in _walk(block, lambda name, _: name in names)
    }
    if named or looks_like is None:
        return named
    guess = Role(next(iter(names.values())), certain, temporal)
    return {path: (module, guess) for path, module in _walk(block, looks_like)}


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _walk(module: nn.Module, wanted: Wanted, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules below one that are wanted, by path; what lies in a wanted one, or in a norm, is not looked at."""
    for name, child in module.named_children():
        if wanted(name, child):
            yield f"{prefix}{name}", child
        elif not _NORM_NAME.fullmatch(name) and not _NORM_NAME.fullmatch(type(child).__name__):
            yield from _walk(child, wanted, f"{prefix}{name}.")


def _layers(module: nn.Module) -> list[Any]:
    # Quantised and adapted layers are no nn.Linear, but have its attributes.
    return [layer for layer in module.modules() if hasattr(layer, "in_features") and hasattr(layer, "out_features")]


def _is_attention(name: str, module: nn.Module) -> bool:
    called = _ATTENTION_NAME.fullmatch(name) or _ATTENTION_NAME.fullmatch(type(module).__name__)
    return called is not None and (len(_layers(module)) >= 2 or isinstance(module, nn.MultiheadAttention))


def _is_mlp(name: str, module: nn.Module) -> bool:
    layers = _layers(module)
    if (
        len(layers) < 2
        or _NORM_NAME.fullmatch(name)
        or _is_attention(name, module)
        or any(_is_attention(inner, child) for inner, child in module.named_modules())
    ):
        return False
    # Gated ones hold their layers in any order.
    return any(a is not b and a.in_features == b.out_features != a.out_features for a in layers for b in layers)


def kind_of(role: Role, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> str | None:
    """What a module is, as its call shows; None where a guess turns out to be wrong.

    Attention that takes another sequence and doesn't return it is cross-attention (joint attention returns both). An MLP takes
    tokens and returns as many of the same width.
    """
    if role.certain:
        return role.kind
    taken, returned = arguments(args, kwargs), tensors(result)
    if not taken or not returned or taken[0][1].ndim < 3:
        return None
    first = taken[0][1]
    if role.kind == MLP:
        return MLP if len(returned) == 1 and returned[0][1].shape == first.shape else None
    named = _names(original)
    others = [tensor for path, tensor in taken[1:] if _is_sequence(named(path), tensor, first)]
    return CROSS if len(others) >= len(returned) else ATTENTION


def _is_sequence(name: str, tensor: Tensor, first: Tensor) -> bool:
    """Whether an argument beside the tokens is another sequence; the very same tensor again (as keys, values) is none."""
    like = tensor.ndim == first.ndim and tensor.is_floating_point() and tensor.shape[0] == first.shape[0]
    return like and tensor is not first and _NO_SEQUENCE.fullmatch(name) is None


def _names(original: Callable[..., Any]) -> Callable[[Path], str]:
    """What a call's argument at a path is called."""
    try:
        positional = list(inspect.signature(original).parameters)
    except (TypeError, ValueError):
        positional = []

    def name(path: Path) -> str:
        key = path[0]
        return key if isinstance(key, str) else positional[key] if key < len(positional) else ""

    return name
