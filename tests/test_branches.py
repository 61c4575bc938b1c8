"""Guidance: separate calls of cond and uncond never see each other's store, and a batch of both is one branch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from drawing import runs
from hypothesis import given
from hypothesis import strategies as st
from stack_runs import Run, advance, conditioning, equal, given_time, noise, samples, tensor_of
from stacks import Stack
from torch import Tensor
from wrapping import Case, cases, handle, stats

from cachekit.policies import every


@dataclass(frozen=True)
class Manner:
    """How a loop calls its branches: with clones of the sample, with rebuilt conditioning, in turning order."""

    cloned: bool = False
    rebuilt: bool = False
    turning: bool = False


def branches(case: Case, model: Stack, run: Run, xs: list[Tensor], ys: list[Tensor], manner: Manner) -> list[list[Tensor]]:
    """Predictions for each conditioning, in separate calls on the same samples."""
    found: list[list[Tensor]] = [[] for _ in ys]
    with torch.no_grad(), case.session(model, run.times):
        for i, (t, x) in enumerate(zip(run.times, xs, strict=True)):
            order = list(enumerate(ys))
            for k, y in reversed(order) if manner.turning and i % 2 else order:
                given = x.clone() if manner.cloned else x, given_time(case.spec, t, run.batch), y.clone() if manner.rebuilt else y
                found[k].append(tensor_of(model(*given)).clone())
    return found


@given(cases().map(Case.wide), runs, st.builds(Manner, st.booleans(), st.booleans(), st.booleans()), st.sampled_from((2, 3)))
def test_separate_calls_never_share(case: Case, run: Run, manner: Manner, count: int) -> None:
    """Two branches or three (perturbed guidance), each as if it had been called alone, and all of one generation."""
    manner = replace(manner, turning=manner.turning and not case.explicit)
    ys = [conditioning(case.spec, run.batch, seed) for seed in range(1, count + 1)]
    xs, model = samples(case.build(), run), case.wrap()
    together = branches(case, model, run, xs, ys, manner)
    for k, y in enumerate(ys):
        assert equal(together[k], branches(case, case.wrap(), run, xs, [y], Manner())[0])
    assert stats(model).generations == 1
    assert sorted(record.i for record in stats(model).records) == sorted(count * list(range(len(run.times))))


@given(cases().map(Case.wide), runs, st.booleans())
def test_equal_conditioning_does_not_mix_branches(case: Case, run: Run, cloned: bool) -> None:
    """An empty prompt beside an empty negative one: nothing but the order of the calls tells them apart."""
    y = conditioning(case.spec, run.batch, 1)
    xs, model = samples(case.build(), run), case.wrap()
    together = branches(case, model, run, xs, [y, y], Manner(cloned=cloned))
    alone = branches(case, case.wrap(), run, xs, [y], Manner())[0]
    assert equal(together[0], alone) and equal(together[1], alone)
    assert stats(model).generations == 1


@given(cases(), runs)
def test_named_branches_never_share(case: Case, run: Run) -> None:
    """Named, they may come in any order and on different samples."""
    ys = [conditioning(case.spec, run.batch, seed) for seed in (1, 2)]
    streams = [samples(case.build(), run), samples(case.build(), replace(run, seed=run.seed + 50))]
    alone = [branches(case, case.wrap(), run, xs, [y], Manner())[0] for xs, y in zip(streams, ys, strict=True)]
    model = case.wrap()
    found: list[list[Tensor]] = [[], []]
    with torch.no_grad(), case.session(model, run.times):
        for i, t in enumerate(run.times):
            for k in (0, 1) if i % 2 else (1, 0):
                with handle(model).branch("ab"[k]):
                    output = model(streams[k][i], given_time(case.spec, t, run.batch), ys[k])
                found[k].append(tensor_of(output).clone())
    assert equal(found[0], alone[0]) and equal(found[1], alone[1])
    assert {record.branch for record in stats(model).records} == {"a", "b"}


@given(cases().map(Case.wide), runs)
def test_batched_guidance_is_one_branch(case: Case, run: Run) -> None:
    """Both conditionings in one batch: every(1) is exact, any policy is on its first step, and steps count on."""
    y = torch.cat([conditioning(case.spec, run.batch, 1), conditioning(case.spec, run.batch, 2)])
    for model, exact in ((case.under(every(1)).wrap(), True), (case.wrap(), False)):
        plain, x = case.build(), noise(case.spec, run.batch, run.seed)
        with torch.no_grad(), case.session(model, run.times):
            for i, t in enumerate(run.times):
                given = torch.cat([x, x]), given_time(case.spec, t, 2 * run.batch), y
                prediction = tensor_of(model(*given))
                if exact or i == 0:
                    assert torch.equal(prediction, tensor_of(plain(*given)))
                cond, uncond = prediction.chunk(2)
                x = advance(x, uncond + 2 * (cond - uncond), 100)
        assert [record.i for record in stats(model).records] == list(range(len(run.times)))
        assert len({record.branch for record in stats(model).records}) == 1


@given(cases().map(Case.wide), runs, st.integers(1, 11))
def test_guidance_may_stop_half_way(case: Case, run: Run, stop: int) -> None:
    """Guidance in an interval: the branch that goes on alone is as if it had been alone from the start."""
    ys = [conditioning(case.spec, run.batch, seed) for seed in (1, 2)]
    xs, model, found = samples(case.build(), run), case.wrap(), []
    with torch.no_grad(), case.session(model, run.times):
        for i, (t, x) in enumerate(zip(run.times, xs, strict=True)):
            for y in ys[: 2 if i < stop else 1]:
                found.append(tensor_of(model(x, given_time(case.spec, t, run.batch), y)).clone())
    kept = [found[2 * i if i < stop else 2 * min(stop, len(xs)) + i - stop] for i in range(len(xs))]
    assert equal(kept, branches(case, case.wrap(), run, xs, ys[:1], Manner())[0])
