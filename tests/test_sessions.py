"""Sessions that are interrupted: by a reset, a step with gradients, one that raises. The rest of their steps stays known."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from cases import Shape
from running import SCHEDULE, assert_equal
from torch import Tensor
from wrapping import handle, stats
from zoo import DIT

import cachekit
from cachekit.policies import first, last

SHAPE = Shape(batch=1)


def _reset(model: Any, given: dict[str, Any]) -> None:
    handle(model).reset()
    model(**given)


def _gradients(model: Any, given: dict[str, Any]) -> None:
    with torch.enable_grad(), pytest.warns(UserWarning, match="while gradients are recorded"):
        model(**given)


def _mixed(model: Any, given: dict[str, Any]) -> None:
    twice = {name: torch.cat([value, value]) for name, value in given.items()}
    model(**{**twice, "timestep": torch.tensor([900, 800])})


def _raises(model: Any, given: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError):
        model(**{**given, "hidden_states": given["hidden_states"][:, :3]})


@torch.no_grad()
@pytest.mark.parametrize("interrupt", [_reset, _gradients, _mixed, _raises])
@pytest.mark.parametrize("at", [1, 3, 4])
def test_the_last_steps_are_full_after_an_interruption(interrupt: Callable[[Any, dict[str, Any]], None], at: int) -> None:
    """They are counted from the session's end, whatever came in between."""
    model, conditioning, n = cachekit.wrap(DIT.build(), first(1) | last(2)), DIT.conditioning(0, SHAPE), len(SCHEDULE)
    full = []
    with handle(model).session(steps=n):
        for k, t in enumerate(SCHEDULE):
            given = DIT.inputs(t, 1, conditioning=conditioning, start=SCHEDULE[0])
            if k == at:
                interrupt(model, given)
            else:
                model(**given)
            full.append(all(stats(model).records[-1].recomputed))
    begun = at if interrupt is _reset else at + 1
    assert full[begun:] == [k in (begun, n - 2, n - 1) for k in range(begun, n)]
    assert stats(model).bytes_held == 0


@torch.no_grad()
def test_samples_are_not_judged_after_a_reset_either() -> None:
    """One tensor again and again is one generation within a session."""
    model, given = cachekit.wrap(DIT.build(), first(1)), DIT.inputs(900.0, 1, conditioning=DIT.conditioning(0, SHAPE))
    with handle(model).session():
        for k, t in enumerate((900, 700, 500, 300)):
            if k == 2:
                handle(model).reset()
            model(**{**given, "timestep": torch.tensor([t])})
    assert [record.i for record in stats(model).records] == [0, 1] and stats(model).generations == 1


def _loop(model: Any, within: Callable[[], AbstractContextManager[None]], seed: int) -> Generator[Tensor, None, None]:
    """A sampling loop that hands something out at each step."""
    with within():
        for t in SCHEDULE:
            yield model(**DIT.inputs(t, 1, seed, conditioning=DIT.conditioning(0, SHAPE))).sample


@torch.no_grad()
@pytest.mark.parametrize("what", ["sessions", "branches"])
def test_loops_that_take_turns_in_one_thread(what: str) -> None:
    """Whose step is whose can't be told: an error as soon as that shows, and nothing of it is left afterwards."""
    model = cachekit.wrap(DIT.build(), first(1))
    within = handle(model).session if what == "sessions" else lambda: handle(model).branch("one of two that are called alike")
    loops = [_loop(model, within, seed) for seed in (1, 2)]
    with pytest.raises(cachekit.ConfigError, match=f"two {what} took turns in one thread"):
        list(zip(*loops, strict=True))
    loops[1].close()
    handle(model).reset()
    found = list(_loop(model, handle(model).session, 3))
    fresh = cachekit.wrap(DIT.build(), first(1))
    assert_equal(found, list(_loop(fresh, handle(fresh).session, 3)))
    assert stats(model).bytes_held == 0 and stats(model).records[-1].branch == stats(fresh).records[-1].branch
