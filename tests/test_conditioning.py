"""Calls in other forms than a tensor for each argument: numbers and arrays of numpy, enumerations, bytes, lists of samples."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from wrapping import stats

import cachekit
from cachekit import ConfigError, ModelError
from cachekit.lane import NEW_ARGUMENTS
from cachekit.policies import every, first


class Mode(Enum):
    """A conditioning that is no number."""

    PLAIN = 0.0
    DOUBLED = 1.0


class Conditioned(nn.Module):
    """Two blocks, and what conditions them added in the end, whatever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor, t: float, given: Any) -> Tensor:
        """x: (B, 8)."""
        for block in self.blocks:
            x = block(x)
        value = given.value if isinstance(given, Enum) else given[0] if isinstance(given, bytes) else np.sum(np.asarray(given))
        return x * 0 + float(value)


class Listed(nn.Module):
    """Two blocks on each of a list of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: list[Tensor], t: float) -> list[Tensor]:
        """x: of (B, 8)."""
        stacked = torch.stack(x)
        for block in self.blocks:
            stacked = block(stacked)
        return list(stacked)


FORMS: list[Callable[[int], Any]] = [
    np.float32,
    np.float64,
    np.int64,
    np.bool_,
    lambda v: np.array([v, 0]),
    lambda v: np.array(v),
    lambda v: {"nested": [np.array([v])]}["nested"],
    lambda v: bytes([v]),
    Mode,
]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_what_changes_half_way_is_seen_in_any_form(form: Callable[[int], Any]) -> None:
    """Another value begins a branch; an equal one, however often it is made anew, goes on."""
    model, x = cachekit.wrap(Conditioned().eval(), first(1), segments="model"), torch.randn(2, 8)
    found = [float(model(x + 0.01 * k, 900.0 - 100 * k, form(int(k >= 2))).mean()) for k in range(4)]
    assert found == [0.0, 0.0, 1.0, 1.0]
    assert [all(record.recomputed) for record in stats(model).records] == [True, False, True, False]


@torch.no_grad()
def test_an_array_that_is_written_into_is_seen() -> None:
    """Its memory is that of the one before; its values are not."""
    model, x = cachekit.wrap(Conditioned().eval(), first(1), segments="model"), torch.randn(2, 8)
    given, found = np.zeros(3), []
    for k in range(4):
        given[0] = k >= 2
        found.append(float(model(x + 0.01 * k, 900.0 - 100 * k, given).mean()))
    assert found == [0.0, 0.0, 1.0, 1.0]


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(8,), (8, 8), (8, 12)])
def test_samples_in_a_list(sizes: tuple[int, ...]) -> None:
    """Z-Image takes a list of samples, of different sizes if need be: none of them is what conditions the others."""
    model: Any = ZImageTransformer2DModel(
        dim=64,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=16,
        in_channels=4,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    ).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randn(5, 16, generator=generator) for _ in sizes]

    def sample(model: Any) -> list[Tensor]:
        draw = torch.Generator().manual_seed(1)
        xs = [torch.randn(4, 1, size, size, generator=draw) for size in sizes]
        # Its pipeline passes (1000 - t) / 1000.
        for k in range(6):
            predictions = model(xs, torch.full((len(sizes),), 0.1 + 0.1 * k), prompts, return_dict=False)[0]
            xs = [x - 0.1 * prediction for x, prediction in zip(xs, predictions, strict=True)]
        return xs

    full = sample(model)
    for policy in (every(1), every(2)):
        cachekit.wrap(model, policy)
        found = sample(model)
        assert stats(model).generations == 1
        assert [record.i for record in stats(model).records] == list(range(6))
        assert [torch.equal(a, b) for a, b in zip(found, full, strict=True)] == [policy == every(1)] * len(sizes)
    sample(model)
    assert stats(model).generations == 2


@torch.no_grad()
def test_a_list_of_samples_has_no_residual_of_one() -> None:
    """What the first sample changed is nothing to the second one's prediction."""
    model = cachekit.wrap(Listed().eval(), every(2), segments="model", reuse="residual")
    with pytest.raises(ConfigError, match="a residual of the whole prediction needs one of the sample's shape"):
        model([torch.randn(2, 8), torch.randn(2, 8)], 900.0)


@torch.no_grad()
def test_what_is_new_at_every_step_is_said() -> None:
    """Nothing is cached then, until an adapter says that it conditions nothing."""
    adapter = cachekit.Adapter(per_step=("given",))
    for facts, ran in ((None, [True] * 4), (adapter, [True, False, False, False])):
        model, x = cachekit.wrap(Conditioned().eval(), first(1), segments="model", adapter=facts), torch.randn(2, 8)
        for k in range(4):
            model(x + 0.01 * k, 900.0 - 100 * k, 1.0 + k)
        assert [all(record.recomputed) for record in stats(model).records] == ran
        assert stats(model).dropped == ({} if facts else {NEW_ARGUMENTS: 3}) and stats(model).generations == 1


@torch.no_grad()
@pytest.mark.parametrize(
    "form", [np.float32, np.array, lambda t: np.array([t, t]), lambda t: [t, t], lambda t: [torch.tensor(t)] * 2, lambda t: (t,)]
)
def test_timesteps_in_any_form(form: Callable[[float], Any]) -> None:
    """Lists and arrays of one number are that number; of several they are mixed timesteps."""
    model, x = cachekit.wrap(Conditioned().eval(), first(1), segments="model"), torch.randn(2, 8)
    for k in range(3):
        model(x + 0.01 * k, form(900.0 - 100 * k), 0)
    assert [(record.t, any(record.recomputed)) for record in stats(model).records] == [(900, True), (800, False), (700, False)]
    model(x, [3.0, 4.0], 0)
    assert stats(model).uncached == {"mixed timesteps in one batch": 1}


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["late", [None], {"t": 3.0}])
def test_a_timestep_that_is_no_number(wrong: Any) -> None:
    """What was read as the timestep is shown, with what to write."""
    model = cachekit.wrap(Conditioned().eval(), first(1), segments="model")
    with pytest.raises(ModelError, match=r"the timestep argument is .*, and no number, .*adapter=cachekit.Adapter"):
        model(torch.randn(2, 8), wrong, 0)
