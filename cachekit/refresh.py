"""Refresh part of a stored value on a reused step: some tokens are computed anew and written into it, the others are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from cachekit.decisions import Decisions
from cachekit.errors import ConfigError
from cachekit.graph import Graph, ModuleVisit
from cachekit.history import push
from cachekit.inside import MLP
from cachekit.layout import Layout
from cachekit.main_stream import with_input
from cachekit.policy import Step
from cachekit.reuse import Reuse
from cachekit.segments import Site
from cachekit.tree import Path, pick

AGES = torch.int16
NO_TOKENS = "tokens are recomputed in MLPs alone, and no segment with such a reuse has one here: values are held"


class Refreshing(Reuse, Protocol):
    """A reuse that names tokens to recompute. It must hold the newest output itself: ``length`` 1, ``beta`` 0, a weight of 1."""

    def choose(
        self, entering: Tensor, held: Tensor, ages: Tensor, step: Step, since: int, measured: Tensor | None
    ) -> Tensor | None:
        """Which tokens of a module to compute anew on a reused step.

        Args:
            entering: what the module takes, (batch, tokens, width).
            held: its stored output, (batch, tokens, width of the output).
            ages: for each token the number of reused steps, before this one, since its value was computed, (batch, tokens).
            step: this step.
            since: number of steps since the module was recomputed as a whole; 1 on the first reused one.
            measured: what its ``measure`` made of the tokens' value vectors when the block's self-attention last ran, (batch,
                tokens); None of a reuse that measures nothing (``cachekit.values.Measuring``).

        Returns:
            Indices without repeats, (batch, k); None to hold all.
        """
        ...


def refreshes(reuse: Any) -> TypeGuard[Refreshing]:
    """Whether a reuse refreshes what it holds."""
    return callable(getattr(reuse, "choose", None))


def takes_tokens(seen: ModuleVisit) -> bool:
    """Whether an MLP takes one tensor (batch, tokens, width) alone and returns one of as many tokens."""
    if seen.kind != MLP or len(seen.inputs) != 1 or len(seen.returned) != 1 or len(seen.held) != 1:
        return False
    (taken, _, _), (returned, dtype, _) = seen.inputs[0][1], seen.returned[0][1]
    return len(taken) == len(returned) == 3 and taken[:2] == returned[:2] and dtype.is_floating_point


def is_tokenwise(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], seen: ModuleVisit, result: Any
) -> bool:
    """Whether a module makes each token of its output from the same token of its input alone, as one call of it shows.

    It is run on every second token, which must come out as they did, but for the rounding of matrix products of another size.
    """
    if not takes_tokens(seen) or not isinstance(result, Tensor):
        return False
    path = seen.inputs[0][0]
    args, kwargs = with_input(args, kwargs, path, pick(args, kwargs, path)[:, ::2])
    some, same = original(*args, **kwargs), result[:, ::2]
    if not isinstance(some, Tensor) or some.shape != same.shape:
        return False
    # A product of width w rounds by about sqrt(w) eps of its terms; another token's part would be of order 1.
    bound = 1000 * torch.finfo(result.dtype).eps * same.abs().max()
    return bool((some - same).abs().max() <= bound)


def check(site: Site) -> None:
    """Refuse a reuse that names tokens where it can't.

    Raises:
        ConfigError: it holds something else than the newest output, or the site is the whole prediction.
    """
    reuse = site.reuse
    if refreshes(reuse) and site.segment.is_model:
        raise ConfigError("the whole prediction has no tokens to recompute; give reuse='output' or 'taylor-K', or other segments")
    if refreshes(reuse) and (reuse.length != 1 or reuse.beta):
        raise ConfigError(f"{reuse!r} has choose(), and writes tokens into the newest output: it needs length 1 and beta 0")


def notes(graph: Graph, layout: Layout, sites: tuple[Site, ...]) -> set[str]:
    """A sentence where a reuse that names tokens has no module that it can refresh."""
    able = {
        k
        for visit, owners in zip(graph.visits, layout.modules, strict=True)
        for module, k in zip(visit.modules, owners, strict=True)
        if module.tokenwise
    }
    return {NO_TOKENS} if any(refreshes(site.reuse) and k not in able for k, site in enumerate(sites)) else set()


def reset(decisions: Decisions, k: int, v: int, path: Path, value: Tensor) -> None:
    """Every token of a module is new."""
    push(decisions.branch.store, (k, v, (*path, "ages")), float(decisions.step.i), value.new_zeros(value.shape[:2], dtype=AGES))


def refresh(
    decisions: Decisions,
    k: int,
    v: int,
    path: Path,
    seen: ModuleVisit,
    original: Callable[..., Any],
    given: tuple[Any, dict[str, Any]],
) -> None:
    """Compute the chosen tokens anew, and write them into what is stored.

    Args:
        v, path: where the module's output is stored.
        given: its arguments on this step.
    """
    reuse, store = decisions.sites[k].reuse, decisions.branch.store
    if not refreshes(reuse):
        return
    (time, held), (then, ages) = store[k, v, path].entries[0], store[k, v, (*path, "ages")].entries[0]
    at = seen.inputs[0][0]
    entering = pick(*given, at)
    measured = decisions.branch.measured.get((v, int(path[0])))
    chosen = reuse.choose(entering, held, ages, decisions.step, decisions.step.i - int(then), measured)
    ages = ages + 1
    if chosen is not None and chosen.shape[1]:
        args, kwargs = with_input(*given, at, entering.gather(1, _over(chosen, entering)))
        fresh = original(*args, **kwargs).detach()
        # Out of place: what was stored under torch.inference_mode() can't be written into outside of it.
        push(store, (k, v, path), time, held.scatter(1, _over(chosen, held), fresh.to(held.dtype)))
        ages = ages.scatter(1, chosen, 0)
    push(store, (k, v, (*path, "ages")), then, ages)


def _over(chosen: Tensor, like: Tensor) -> Tensor:
    return chosen.unsqueeze(-1).expand(-1, -1, like.shape[-1])
