"""What the stages of a retrofit train, what the weights become, and what is put back."""

from __future__ import annotations

import gc
from typing import Any

import original_zoo
import pytest
import torch
from adding import all_cases
from cases import Case
from retrofitting import Stopped, built, data_of, run, same, some_cases, state_of
from running import generate, ran
from torch import Tensor, nn
from zoo import DIT, FLUX, LATTE, SD3

import cachekit
from cachekit import Distillation, Stage


@pytest.mark.parametrize("case", [DIT, LATTE, SD3, FLUX, original_zoo.LATTE], ids=str)
def test_the_first_stage_changes_the_fusions_alone(case: Case) -> None:
    model = built(case)
    before = state_of(model)
    after = run(model, case, Stage(steps=2, train="fusions"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.startswith("long_skips.")}


@all_cases
def test_a_wrapped_model_of_any_kind_learns_in_both_stages(case: Case) -> None:
    """From the target and from the original; every fusion and every block changes, and the cache goes on as before."""
    model = cachekit.wrap(built(case, "paper"), "every-2", segments="skip-1")
    before = state_of(model)
    stages = [Stage(steps=2, train=train, lr=1e-3, distill=Distillation()) for train in ("fusions", "all")]
    after = run(model, case, *stages, ema=None)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert {key for key in before if key.startswith("long_skips.")} <= set(changed)
    assert all(any(key.startswith(f"{path}.") for key in changed) for path in case.stack)
    with torch.no_grad():
        generate(model, case, (900.0, 800.0))
    assert sum(ran(model)) == 2 * case.unit


@some_cases
def test_the_second_stage_changes_everything_but_what_was_frozen(case: Case) -> None:
    model = built(case, "paper")
    kept = next(name for name, _ in model.named_parameters() if "attn" in name and name.endswith("weight"))
    model.get_parameter(kept).requires_grad_(False)
    before = state_of(model)
    run(model, case, Stage(steps=2, train="fusions"), Stage(steps=2, train="all"), ema=None)
    unused = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    plain = case.build()
    inputs, _ = data_of(case)(0)
    case.output(plain(**inputs)).square().sum().backward()  # type: ignore[no-untyped-call]
    blind = {name for name, parameter in plain.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert kept in unused and unused <= blind | {kept}


def test_a_control_equals_the_plain_model_trained_on() -> None:
    """Residual fusions that were just added and are not trained change nothing: written out, on a model that never had any."""
    data = [data_of(DIT)(step) for step in range(4)]
    model = built(DIT)
    fusions = {name: value for name, value in state_of(model).items() if name.startswith("long_skips.")}
    cachekit.retrofit(model, data.__getitem__, stages=[Stage(steps=4, train="original")], ema=None, clip=None, progress=False)
    plain = DIT.build().train()
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)
    for step, (inputs, target) in enumerate(data):
        with torch.random.fork_rng():
            torch.manual_seed(step * 2 + 1)
            loss = (plain(**inputs).sample[:, :4] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = state_of(model)
    assert same(fusions, {name: after[name] for name in fusions})
    assert same(state_of(cachekit.remove_long_skips(model)), state_of(plain))


def test_the_average_equals_a_plain_loop() -> None:
    """Written out: AdamW at 1e-4 without weight decay, gradients clipped at 0.1, and the average."""
    steps, decay = 6, 0.4
    data = [data_of(DIT)(step) for step in range(steps)]
    model = cachekit.retrofit(built(DIT), data.__getitem__, stages=[Stage(steps=steps, train="all")], ema=decay, progress=False)
    plain = built(DIT).train()
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)
    average = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for step, (inputs, target) in enumerate(data):
        with torch.random.fork_rng():
            torch.manual_seed(step * 2 + 1)
            loss = (plain(**inputs).sample[:, :4] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimiser.step()
        rate = min(decay, (1 + step) / (10 + step))
        for name, parameter in plain.named_parameters():
            average[name] += (1 - rate) * (parameter.detach() - average[name])
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, average[name], rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_everything_else_is_as_it_was(fails: bool, wrapped: bool) -> None:
    model = built(DIT).to(torch.bfloat16)
    model.transformer_blocks[1].train()
    model.pos_embed.proj.weight.requires_grad_(False)
    if wrapped:
        cachekit.wrap(model, "every-2", segments="skip-1")
    facts = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    flags = [(parameter.requires_grad, parameter.dtype, id(parameter)) for parameter in model.parameters()]
    generator = torch.get_rng_state()
    seen: set[tuple[torch.dtype, bool]] = set()

    def data(step: int) -> tuple[dict[str, Any], Tensor]:
        if fails and step == 1:
            raise Stopped
        seen.update((parameter.dtype, parameter.requires_grad) for parameter in model.parameters())
        inputs = DIT.inputs(500, dtype=torch.bfloat16, seed=step)
        return inputs, torch.zeros_like(inputs["hidden_states"])

    before = state_of(model)
    with torch.no_grad():
        try:
            cachekit.retrofit(model, data, stages=[Stage(steps=3, train="all", lr=0.1)], progress=False)
        except Stopped:
            assert fails
        assert not torch.is_grad_enabled()
    assert seen == {(torch.float32, True), (torch.float32, False)}
    assert facts == [(module.training, len(module._forward_hooks)) for module in model.modules()]
    assert flags == [(parameter.requires_grad, parameter.dtype, id(parameter)) for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not same(state_of(model), before)
    if wrapped:
        assert not model.cachekit.stats.records
        with torch.no_grad():
            for t in (900, 800):
                model(**DIT.inputs(t, dtype=torch.bfloat16))
        assert sum(model.cachekit.stats.records[-1].recomputed) == 2


def test_compiled_blocks_train_alike() -> None:
    stage = Stage(steps=3, train="all", distill=Distillation())
    expected = run(built(DIT, "paper"), DIT, stage)
    model = built(DIT, "paper")
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    found = run(model, DIT, stage)
    assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected)


@some_cases
@pytest.mark.parametrize("train", ["fusions", "all"])
def test_checkpointed_blocks_train_alike(case: Case, train: Any) -> None:
    """Also while the fusions learn alone, when the first streams into them need no gradient. Nothing is held afterwards."""
    stage = Stage(steps=2, train=train, distill=Distillation())
    expected = run(built(case, "paper"), case, stage)
    model = cachekit.wrap(built(case, "paper"), "every-2")
    model.enable_gradient_checkpointing()
    found = run(model, case, stage)
    assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected)
    gc.collect()
    assert len(model.long_skips.passed) == 0
