"""EasyCache against a plain loop around the model, as its authors write it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from published import COGVIEW4
from running import generate
from torch import Tensor
from zoo import COGVIDEOX, DIT, FLUX, HUNYUAN_VIDEO, SD3, WAN

import cachekit
from cachekit.policies import easycache

TIMES = tuple(float(t) for t in range(960, 100, -50))
# Those whose prediction has the sample's shape.
CASES = (HUNYUAN_VIDEO, FLUX, WAN, SD3, COGVIDEOX, COGVIEW4)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def mean(x: Tensor) -> float:
    return float(x.abs().mean())


def loop(case: Case, times: Sequence[float], threshold: float, warm_up: int) -> tuple[list[bool], list[Tensor]]:
    """Which steps are full, and the predictions. ``computed`` is the input of the last full step."""
    model, conditioning = case.build(), case.conditioning()
    found: list[Tensor] = []
    decisions: list[bool] = []
    previous = computed = output = cache = None
    k = None
    error = 0.0
    for i, t in enumerate(times):
        inputs = case.inputs(t, conditioning=conditioning, start=times[0])
        x = inputs[case.names[0]].clone()
        full = True
        if i < warm_up or i >= len(times) - 1:
            error = 0.0
        elif previous is not None and output is not None and k is not None:
            error += k * (mean(x - previous) / mean(output))
            full = not error < threshold
            error = 0.0 if full else error
        previous = x
        if full or cache is None:
            result = case.output(model(**inputs)).clone()
            if output is not None and computed is not None:
                k = mean(result - output) / mean(x - computed)
            computed, output, cache = x, result, result - x
            found.append(result)
        else:
            found.append(x + cache)
        decisions.append(full)
    return decisions, found


def ours(case: Case, policy: Any, times: Sequence[float], **options: Any) -> tuple[list[bool], list[Tensor], Any]:
    model = cachekit.wrap(case.build(), policy, **options)
    with model.cachekit.session(steps=len(times)), model.cachekit.branch("only"):
        found = generate(model, case, times)
        held = model.cachekit.stats.bytes_held
    return [all(record.recomputed) for record in model.cachekit.stats.records], found, held


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threshold", (0.025, 0.15, 0.4))
def test_equal_to_the_loop(case: Case, threshold: float) -> None:
    """Decisions and samples, bit for bit: the means are the same ones, and a residual is one subtraction and one addition."""
    expected, samples = loop(case, TIMES, threshold, warm_up=5)
    found, predictions, _ = ours(case, f"easycache-{threshold}", TIMES)
    assert found == expected and all(expected[:5]) and expected[-1] and (threshold < 0.4 or not all(expected))
    assert all(a.equal(b) for a, b in zip(predictions, samples, strict=True))


@settings(max_examples=15)
@given(
    st.sampled_from((FLUX, WAN)),
    st.lists(st.integers(20, 990), min_size=2, max_size=14, unique=True),
    st.floats(0, 1),
    st.integers(0, 6),
)
def test_any_threshold_warm_up_and_schedule(case: Case, drawn: list[int], threshold: float, warm_up: int) -> None:
    times = [float(t) for t in sorted(drawn, reverse=True)]
    expected, samples = loop(case, times, threshold, warm_up)
    found, predictions, _ = ours(case, easycache(threshold, warm_up=warm_up), times)
    assert found == [i == 0 or full for i, full in enumerate(expected)]
    assert all(a.equal(b) for a, b in zip(predictions, samples, strict=True))


def test_no_block_is_run_on_a_reused_step_and_four_predictions_are_held() -> None:
    """The residual, the last computed output, and two inputs: the last computed and the last."""
    found, _, held = ours(FLUX, "easycache-0.4", TIMES)
    size = 2 * 16 * 16 * 4
    assert not all(found) and held == 4 * size


def test_other_segments_and_reuse() -> None:
    """The decision is the same one wherever the output is what it was; on a segment it sees what the model returns from it."""
    model = cachekit.wrap(FLUX.build(), "easycache-0.4", segments="middle", reuse="residual")
    with model.cachekit.session(steps=len(TIMES)):
        generate(model, FLUX, TIMES)
    records = [record.recomputed for record in model.cachekit.stats.records]
    assert [all(record) for record in records] == loop(FLUX, TIMES, 0.4, 5)[0]
    assert all(record[0] and record[-1] for record in records)
    assert ours(FLUX, "easycache-0.4", TIMES, reuse="output")[0] == loop(FLUX, TIMES, 0.4, 5)[0]


def test_each_branch_decides_for_itself() -> None:
    """Two passes of classifier-free guidance: each as if it were alone."""
    model, alone = cachekit.wrap(WAN.build(), "easycache-0.3"), {}
    names = {"cond": 0, "uncond": 1}
    for name, prompt in names.items():
        single = cachekit.wrap(WAN.build(), "easycache-0.3")
        with single.cachekit.session(steps=len(TIMES)), single.cachekit.branch(name):
            alone[name] = generate(single, WAN, TIMES, prompt=prompt)
    prompts = {name: WAN.conditioning(prompt) for name, prompt in names.items()}
    with model.cachekit.session(steps=len(TIMES)):
        for i, t in enumerate(TIMES):
            for name in names:
                with model.cachekit.branch(name):
                    inputs = WAN.inputs(t, conditioning=prompts[name], start=TIMES[0])
                    assert WAN.output(model(**inputs)).equal(alone[name][i])


def test_a_sample_that_the_sampler_writes_over() -> None:
    """The same tensor at every step, changed in place: what was seen of it is a copy."""
    expected, samples = loop(FLUX, TIMES, 0.3, 5)
    model, conditioning = cachekit.wrap(FLUX.build(), "easycache-0.3"), FLUX.conditioning()
    x = FLUX.sample(TIMES[0], start=TIMES[0])
    with model.cachekit.session(steps=len(TIMES)), model.cachekit.branch("only"):
        for i, t in enumerate(TIMES):
            inputs = FLUX.inputs(t, conditioning=conditioning, start=TIMES[0])
            x.copy_(inputs[FLUX.names[0]])
            assert FLUX.output(model(**{**inputs, FLUX.names[0]: x})).equal(samples[i])
    assert [all(record.recomputed) for record in model.cachekit.stats.records] == expected


def test_a_prediction_of_another_shape_than_the_sample_is_refused_unless_the_output_is_reused() -> None:
    """A DiT that predicts its variance too: nothing is left out in silence."""
    with pytest.raises(cachekit.ConfigError, match="needs one of the sample's shape"):
        ours(DIT, "easycache-0.3", TIMES)
    found, _, _ = ours(DIT, "easycache-0.3", TIMES, reuse="output")
    assert not all(found)
