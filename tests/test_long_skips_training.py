"""Training added long skip connections: gradients, checkpointed blocks, and the spectral bound."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from adding import fusions, output, shaken, some_cases
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import DIT

import cachekit
from cachekit.fusions import Spectral


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.keywords):
        yield


@pytest.mark.gradients
@fusions
@some_cases
def test_training_reaches_the_fusions(case: Case, fusion: str) -> None:
    model = cachekit.add_long_skips(case.build(), fusion=fusion, seed=0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.long_skips.requires_grad_(True)
    before = output(model, case)
    optimiser = torch.optim.AdamW(model.long_skips.parameters(), lr=0.05)
    for _ in range(2):
        optimiser.zero_grad()
        output(model, case).square().sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    grads = [parameter.grad for parameter in model.long_skips.parameters()]
    assert all(grad is not None and bool(grad.any()) for grad in grads)
    assert not torch.equal(output(model, case), before)


@pytest.mark.gradients
@some_cases
def test_gradients_reach_early_blocks_through_the_long_skips(case: Case) -> None:
    """And with checkpointed blocks they are the same; nothing is held when the graph is gone."""
    model = shaken(cachekit.add_long_skips(case.build(), fusion="paper", seed=0))
    model.long_skips["0_to_5" if case.unit == 1 else "0_to_4"].linear.weight.data[:, : model.long_skips.connections[0].width] = 0

    def gradients() -> list[Tensor]:
        model.zero_grad()
        output(model, case).square().sum().backward()  # type: ignore[no-untyped-call]
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    early = model.get_submodule(model.long_skips.connections[0].early)
    assert any(bool(parameter.grad.any()) for parameter in early.parameters() if parameter.grad is not None)
    model.train().enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
    for module in model.modules():
        module.training = module is model
    again = gradients()
    assert len(again) == len(expected)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(again, expected, strict=True))
    gc.collect()
    assert len(model.long_skips.passed) == 0


@pytest.mark.gradients
def test_reentrant_checkpointing_is_refused() -> None:
    model = cachekit.add_long_skips(DIT.build().train())
    model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    with pytest.raises(cachekit.ModelError, match="use_reentrant=False"):
        output(model, DIT)


@pytest.mark.gradients
@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([torch.float32, torch.float64]))
def test_the_spectral_bound_holds_while_training(seed: int, bound: float, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    fusion = Spectral(12, bound).to(dtype)
    x, skip, target = torch.randn(3, 4, 5, 12, dtype=dtype)
    optimiser = torch.optim.AdamW(fusion.parameters(), lr=0.3)
    reached = 0.0
    for k in range(12):
        optimiser.zero_grad()
        (fusion(x, skip) - 10 * target).square().mean().backward()
        optimiser.step()
        fusion.train(k % 2 == 0)
        with torch.no_grad():
            fusion(x, skip)
            sigma = float(torch.linalg.matrix_norm(fusion.linear.bounded, 2))
        assert sigma <= bound * (1 + 1e-5)
        reached = max(reached, sigma)
    assert reached > 0.9 * bound


@pytest.mark.gradients
def test_gradients_of_the_spectral_bound() -> None:
    fusion = Spectral(4, 0.5).double()
    nn.init.normal_(fusion.linear.weight)
    x, skip = torch.randn(2, 3, 4, dtype=torch.float64)
    weight = fusion.linear.weight.detach().clone().requires_grad_()

    def run(given: Tensor) -> Any:
        return torch.func.functional_call(fusion, {"linear.weight": given}, (x, skip))

    assert torch.autograd.gradcheck(run, (weight,))


def test_the_spectral_fusion_sees_new_weights_when_sampling() -> None:
    model = shaken(cachekit.add_long_skips(DIT.build(), fusion="spectral", seed=0))
    other = shaken(cachekit.add_long_skips(DIT.build(), fusion="spectral", seed=0), seed=7)
    output(model, DIT)
    model.load_state_dict(other.state_dict())
    assert torch.equal(output(model, DIT), output(other, DIT))
    assert torch.equal(output(model, DIT), output(copy.deepcopy(model), DIT))
