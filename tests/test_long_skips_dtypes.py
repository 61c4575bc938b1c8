"""Fusions in half models, of mixed dtypes, under autocast, and with weights that are lost or very large."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from adding import fusions, output, shaken
from retrofitting import data_of, state_of
from torch import Tensor
from torch.nn import functional
from zoo import DIT, LATTE, WAN

import cachekit
from cachekit import Stage
from cachekit.fusions import Spectral, make_fusion

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.keywords):
        yield


def half_wan() -> Any:
    """As ``from_pretrained(torch_dtype=...)`` gives it: some modules stay in float32, the first of a block among them."""
    model = WAN.build()
    kept = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


@fusions
def test_a_half_model_that_keeps_some_weights_in_float32(fusion: str) -> None:
    model = half_wan()
    assert next(model.blocks[-1].parameters()).dtype == torch.float32
    before = output(model, WAN, dtype=torch.bfloat16)
    cachekit.add_long_skips(model, fusion=fusion, seed=0)
    assert {parameter.dtype for parameter in model.long_skips.parameters()} == {torch.bfloat16}
    after = output(model, WAN, dtype=torch.bfloat16)
    assert after.dtype == before.dtype and torch.equal(after, before) == (fusion != "paper")


@HALVES
@pytest.mark.parametrize("fusion", ["paper", "residual"])
def test_a_fusion_computes_in_its_own_dtype(fusion: str, dtype: torch.dtype) -> None:
    """Float32 fusions in a half model, which is how they are trained alone, against the formula written out."""
    made: Any = make_fusion(fusion, 6)
    for parameter in made.parameters():
        parameter.normal_()
    x, skip = torch.randn(2, 3, 5, 6).to(dtype)
    normed = functional.layer_norm(torch.cat([x, skip], -1).float(), (12,), made.norm.weight, made.norm.bias, 1e-6).to(dtype)
    expected = functional.linear(normed.float(), made.linear.weight, made.linear.bias).to(dtype)
    assert torch.equal(made(x, skip), expected if fusion == "paper" else x + expected)


@fusions
def test_float32_fusions_in_a_half_model(fusion: str) -> None:
    model = cachekit.add_long_skips(DIT.build().to(torch.bfloat16), fusion=fusion, seed=0)
    half = output(shaken(model), DIT, dtype=torch.bfloat16)
    model.long_skips.float()
    found = output(model, DIT, dtype=torch.bfloat16)
    # The same weights; only the product's rounding differs.
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), half.float(), rtol=0.1, atol=0.1)


@pytest.mark.gradients
@HALVES
@fusions
@pytest.mark.parametrize("case", [DIT, LATTE], ids=str)
def test_autocast(case: Any, fusion: str, dtype: torch.dtype) -> None:
    """Insertion changes nothing there either, the stream keeps its dtype, and gradients arrive."""
    model = case.build()
    with torch.autocast("cpu", dtype=dtype):
        before = output(model, case)
        cachekit.add_long_skips(model, fusion=fusion, seed=0)
        after = output(model, case)
        assert after.dtype == before.dtype and torch.equal(after, before) == (fusion != "paper")
    shaken(model)
    # Autocast keeps its copies of weights until it ends.
    with torch.autocast("cpu", dtype=dtype):
        loss = output(model, case).float().square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.long_skips.parameters())


@fusions
def test_weights_that_are_only_stored_in_a_byte(fusion: str) -> None:
    """diffusers' layerwise casting: fusions that are added later compute as the blocks do."""
    model = DIT.build()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = output(model, DIT)
    cachekit.add_long_skips(model, fusion=fusion, seed=0)
    assert {parameter.dtype for parameter in model.long_skips.parameters()} == {torch.float32}
    assert torch.equal(output(model, DIT), before) == (fusion != "paper")


@HALVES
def test_the_spectral_bound_under_autocast(dtype: torch.dtype) -> None:
    """It is found in float32, whatever the products around it are made in."""
    fusion: Any = Spectral(32)
    fusion.linear.weight.normal_()
    expected = fusion.linear.bounded
    fusion.train()
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(fusion.linear.bounded, expected)
    assert torch.linalg.matrix_norm(expected, 2).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_spectral_bound_in_other_dtypes(dtype: torch.dtype) -> None:
    """Rounding W, of rank 8, moves its singular values by at most eps / 2 times its Frobenius norm, which is at most 8 ** .5."""
    fusion = Spectral(8).to(dtype)
    fusion.linear.weight.normal_()
    sigma = torch.linalg.matrix_norm(fusion.linear.bounded.double(), 2).item()
    assert sigma <= 1 + max(1e-5, torch.finfo(dtype).eps * 8**0.5 / 2)


@pytest.mark.parametrize("size", [1e-30, 1e15, 1e25, float("inf"), float("nan")])
def test_the_spectral_bound_of_extreme_weights(size: float) -> None:
    """Large ones are bounded; lost ones come out lost, so that a training that diverged says so."""
    fusion = Spectral(6)
    fusion.linear.weight.normal_().mul_(size)
    x: Tensor = torch.randn(2, 6)
    found = fusion.linear.bounded
    if torch.isfinite(fusion.linear.weight).all():
        assert torch.linalg.matrix_norm(found.double(), 2) <= 1 + 1e-5
        assert torch.isfinite(fusion(x, x)).all()
    else:
        assert not torch.isfinite(fusion(x, x)).all()


@pytest.mark.gradients
def test_a_diverged_retrofit_says_so_with_spectral_fusions() -> None:
    model = cachekit.add_long_skips(DIT.build(), fusion="spectral", seed=0)
    with pytest.raises(cachekit.ModelError, match="lower lr"):
        cachekit.retrofit(model, data_of(DIT), stages=[Stage(steps=8, train="all", lr=1e20)], progress=False)


@pytest.mark.gradients
def test_a_retrofit_under_autocast_equals_a_plain_loop() -> None:
    """Autocast around each forward alone, as torch says to: around the training it must not keep the weights of the first step."""
    data = [data_of(DIT)(step) for step in range(4)]
    model = cachekit.add_long_skips(DIT.build(), fusion="paper", seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = output(model, DIT)
        stages = [Stage(steps=4, train="all", lr=1e-2)]
        cachekit.retrofit(model, data.__getitem__, stages=stages, ema=None, clip=None, progress=False)
        after = output(model, DIT)
    plain = cachekit.add_long_skips(DIT.build(), fusion="paper", seed=0).train()
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for step, (inputs, target) in enumerate(data):
        with torch.random.fork_rng(), torch.autocast("cpu", dtype=torch.bfloat16):
            torch.manual_seed(step * 2 + 1)
            loss = (plain(**inputs).sample[:, :4] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(after, output(plain.eval(), DIT)) and not torch.equal(after, before)


@pytest.mark.gradients
@HALVES
@fusions
def test_a_half_model_is_retrofitted_and_is_half_afterwards(fusion: str, dtype: torch.dtype) -> None:
    """It learns in float32."""
    model = cachekit.add_long_skips(DIT.build().to(dtype), fusion=fusion, seed=0)
    before = state_of(model)
    cachekit.retrofit(model, data_of(DIT), stages=[Stage(steps=2, train="all", lr=1e-2)], progress=False)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key in before if key.startswith("long_skips.")} <= changed
