"""What is stored of a module's calls, and what a reused one returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cachekit.decisions import Decisions
from cachekit.errors import ConfigError
from cachekit.graph import ModuleVisit
from cachekit.refresh import refresh, refreshes, reset
from cachekit.tree import Path, get, pick, replaced

Entering = dict[Path, Tensor]


def check_entries(decisions: Decisions, k: int, seen: ModuleVisit) -> None:
    """Refuse a residual of what has none.

    Raises:
        ConfigError: the reuse counts from the input, and nothing of an output's shape enters.
    """
    lacking = [sig for out, sig in seen.held if out not in dict(seen.entry) and sig[1].is_floating_point]
    if decisions.sites[k].reuse.beta and lacking:
        raise ConfigError(
            f"module {seen.name!r} takes nothing of the shape {lacking[0][0]} that it returns, so that there is no residual of it; "
            "use reuse='output' or 'taylor-K', or leave it out of modules="
        )


def entering(decisions: Decisions, k: int, seen: ModuleVisit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entering:
    """For each stored output what enters for it, where the reuse counts from that. Copies: it must be as it was."""
    if not decisions.sites[k].reuse.beta:
        return {}
    return {out: pick(args, kwargs, path).detach().clone() for out, path in seen.entry}


def keep(decisions: Decisions, k: int, at: tuple[int, int], seen: ModuleVisit, result: Any, entering: Entering) -> None:
    """Store what a module returned.

    Args:
        at: the visit of its block, and the number of its call in it.
    """
    for path, _ in seen.held:
        decisions.keep(k, at[0], (at[1], *path), get(result, path), entering.get(path))
        if seen.tokenwise and refreshes(decisions.sites[k].reuse):
            reset(decisions, k, at[0], (at[1], *path), get(result, path))


def instead(
    decisions: Decisions,
    k: int,
    at: tuple[int, int],
    seen: ModuleVisit,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    entering: Entering,
    original: Callable[..., Any],
) -> Any:
    """What a reused module returns: forecasts of its own, some tokens computed anew, and what it hands back untouched."""
    if seen.tokenwise:
        for path, _ in seen.held:
            refresh(decisions, k, at[0], (at[1], *path), seen, original, (args, kwargs))
    held = {path: decisions.forecast(k, at[0], (at[1], *path), entering.get(path)) for path, _ in seen.held}
    return replaced(seen.structure, {**{out: pick(args, kwargs, path) for path, out in seen.passes}, **held})
