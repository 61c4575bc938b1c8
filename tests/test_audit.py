"""Audits: what they report is what a plain full pass gives, and they change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case as Model
from cases import relative
from drawing import runs
from hypothesis import given
from hypothesis import strategies as st
from running import SCHEDULE, Seen, generate, watching
from stack_blocks import StackSpec
from stack_runs import Run, equal, tensor_of
from stacks import Stack, visits_of
from torch import Tensor, nn
from turns import Turns
from wrapping import Case, cases, handle, stats
from zoo import DIT, FLUX, HUNYUAN_DIT

import cachekit
from cachekit import ConfigError, Stats
from cachekit.estimates import Error

everies = st.integers(1, 4)
orders = st.lists(st.integers(0, 2), min_size=1, max_size=20)
RUN = Run((900.0, 700.0, 500.0, 300.0, 100.0))
CASE = Case(StackSpec(), "every-2", (1, 2), "output", True)
# Both sides are norms of float32 tensors whose elements were computed by the same operations; only the sums' order may differ.
SAME = 1e-5


def audited(case: Case, every: int, model: Stack | None = None) -> Stack:
    """The case's model, wrapped with audits."""
    model = case.build() if model is None else model
    return cachekit.wrap(model, case.policy, segments=case.segments, reuse=case.reuse, audit_every=every)


def counts(found: Stats) -> tuple[Any, ...]:
    """All of the statistics but those of audits."""
    return tuple(value for key, value in vars(found).items() if not key.startswith("audit"))


@given(cases(), runs, everies)
def test_nothing_else_changes(case: Case, run: Run, every: int) -> None:
    """Samples bit by bit, statistics, and what is held; whatever the blocks write into, whatever is reused how."""
    plain, ours = case.wrap(), audited(case, every)
    assert equal(case.run(ours, run), case.run(plain, run))
    assert counts(stats(ours)) == counts(stats(plain))
    reused = [record.i for record in stats(plain).records if not all(record.recomputed + record.modules)]
    assert [found.i for found in stats(ours).audits] == reused[every - 1 :: every]
    assert stats(ours).audited == len(stats(ours).audits)


def naive_errors(model: nn.Module, full: nn.Module, case: Model, path: str, segments: Any) -> tuple[list[Any], list[Any]]:
    """(step, relative error) of the reused steps' predictions, and of what enters a block behind the segment."""
    ours, theirs = Seen(), Seen()
    with watching(model, [path], ours), watching(full, [path], theirs):
        reused, true = generate(model, case, SCHEDULE), generate(full, case, SCHEDULE)
    outputs, sites = [], []
    for step, record in enumerate(stats(model).records):
        entered = ours.pop(0)[1][0]
        if not all(record.recomputed):
            ours.pop(0)  # the shadow's
            outputs.append((step, relative(reused[step], true[step])))
            sites.append((step, relative(entered, theirs[step][1][0])))
    assert not ours
    return outputs, sites


@pytest.mark.parametrize("case", (DIT, FLUX, HUNYUAN_DIT), ids=str)
@pytest.mark.parametrize("reuse", ("output", "residual", "taylor-1"))
def test_errors_are_those_of_a_plain_full_pass(case: Model, reuse: str) -> None:
    """On the same samples, and what enters the block behind the segment is the site's value."""
    model = case.build()
    full = copy.deepcopy(model)
    # FLUX' first segment ends where its two streams become one.
    cachekit.wrap(model, "every-3", segments=(1, 2), reuse=reuse, audit_every=1)
    with torch.no_grad():
        outputs, sites = naive_errors(model, full, case, case.stack[2], (1, 2))
    found = stats(model).audits
    assert outputs and [step for step, _ in outputs] == [audit.i for audit in found]
    assert [audit.error for audit in found] == pytest.approx([error for _, error in outputs], rel=SAME)
    if case is not FLUX:  # its context is a second tensor of the site
        assert [audit.sites[0].error for audit in found] == pytest.approx([error for _, error in sites], rel=SAME)


def test_a_whole_prediction_is_its_own_site() -> None:
    model = cachekit.wrap(DIT.build(), "every-2", segments="model", audit_every=1)
    with torch.no_grad():
        reused, true = generate(model, DIT, SCHEDULE), generate(DIT.build(), DIT, SCHEDULE)
    expected = [relative(reused[i], true[i]) for i in range(1, len(SCHEDULE), 2)]
    assert min(expected) > 0
    assert [audit.error for audit in stats(model).audits] == pytest.approx(expected, rel=SAME)
    assert [audit.sites[0].error for audit in stats(model).audits] == pytest.approx(expected, rel=SAME)
    assert stats(model).audit_blocks == len(expected) * len(DIT.stack)
    assert stats(model).blocks_run == (len(SCHEDULE) - len(expected)) * len(DIT.stack)


def test_several_tensors_count_together() -> None:
    """Over all elements at once, in at least single precision; integers don't count."""
    error, (a, b) = Error(), torch.randn(2, 6, dtype=torch.float64)
    error.add(a[:2], b[:2])
    error.add(a[2:].half(), b[2:].half())
    error.add(torch.tensor([1]), torch.tensor([5]))
    # Half precision rounds by 2^-11 of values that are a few times the differences at most.
    assert error.value == pytest.approx(relative(a, b), rel=1e-2)
    assert Error().value == 0.0


def with_mix(model: Stack, change: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], where: int = 1) -> Stack:
    """A stack one of whose blocks does something else as well."""
    mix = visits_of(model)[where].mix
    mix.__dict__["forward"] = partial(change, mix.forward)
    return model


def noisy(original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return original(x) + 0.1 * torch.rand_like(x)


def test_random_numbers_are_as_if_nothing_was_audited() -> None:
    """A model that draws some, in the block that is left out on reused steps and runs in the shadow."""
    found = []
    for every in (None, 1):
        model = cachekit.wrap(with_mix(CASE.build(), noisy), "every-2", segments=(1, 2), audit_every=every)
        torch.manual_seed(3)
        found.append(RUN.outputs(model))
    assert equal(*found)
    assert stats(model).audited == 2


class Drawing(nn.Module):
    """Draws from the generator that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3)) for _ in range(3))

    def forward(self, x: Tensor, t: float, generator: torch.Generator) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x + torch.rand(x.shape, generator=generator)


def test_a_generator_among_the_arguments_is_as_if_nothing_was_audited() -> None:
    torch.manual_seed(0)
    model, found = Drawing(), []
    for every in (None, 1):
        cachekit.wrap(model, "every-2", audit_every=every)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), handle(model).session(steps=4):
            found.append([model(torch.ones(2, 3) + t, t, generator) for t in (4.0, 3.0, 2.0, 1.0)])
    assert equal(*found)
    assert stats(model).audited == 2


def test_a_model_that_writes_into_its_buffers_is_not_audited() -> None:
    """A full pass more would change what its next step returns; stats say so."""

    def counting(model: Stack, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        model.seen.add_(1)  # type: ignore[operator]
        return original(x) * (1 + model.seen / 10)  # type: ignore[operator]

    found = []
    for every in (None, 1):
        model = CASE.build()
        model.register_buffer("seen", torch.zeros(()))
        cachekit.wrap(with_mix(model, partial(counting, model)), "every-2", segments=(1, 2), audit_every=every)
        found.append(RUN.outputs(model))
    assert equal(*found)
    assert stats(model).audited == 0 and any("nothing is audited" in note for note in stats(model).notes)


class Boom(Exception):
    """Raised in a full pass in the shadow."""


class Nth:
    """Raises in the nth call of a block."""

    def __init__(self, n: int, error: type[BaseException]) -> None:
        self.n, self.error, self.calls = n, error, 0

    def __call__(self, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.n:
            raise self.error
        return original(x)


def test_an_audit_that_fails_is_noted_and_the_sample_is_none_the_worse() -> None:
    """The left-out block runs at step 0, and then in the shadow of step 1."""
    model = audited(CASE, 1, with_mix(CASE.build(), Nth(2, Boom)))
    assert equal(CASE.run(model, RUN), CASE.run(CASE.wrap(), RUN))
    assert [audit.i for audit in stats(model).audits] == [3] and stats(model).audited == 2
    assert "an audit failed: Boom: " in stats(model).notes


def test_an_interrupt_in_an_audit_gets_through_and_leaves_nothing_behind() -> None:
    model = audited(CASE, 1, with_mix(CASE.build(), Nth(2, KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        CASE.run(model, RUN)
    assert stats(model).bytes_held == 0
    assert equal(CASE.run(model, RUN), CASE.run(CASE.wrap(), RUN))


@given(
    cases().map(Case.wide), st.lists(runs, min_size=2, max_size=3), st.lists(st.integers(0, 2), min_size=1, max_size=20), everies
)
def test_generations_in_several_threads_are_audited_apart(case: Case, drawn: list[Run], order: list[int], every: int) -> None:
    """Block by block in turn, audits among them: samples and counts are those of each run alone."""
    turns = Turns(order)
    model = turns.pause_in_blocks(audited(case, every))
    found = turns.run([partial(case.run, model, run) for run in drawn])
    alone = [audited(case, every) for _ in drawn]
    for run, ours, other in zip(drawn, found, alone, strict=True):
        assert equal(ours, case.run(other, run))
    for name in ("audited", "audit_blocks", "blocks_run"):
        assert getattr(stats(model), name) == sum(getattr(stats(other), name) for other in alone)


def test_a_model_that_writes_into_its_sample_is_audited_on_the_sample_that_it_was_given() -> None:
    def writing(model: Stack) -> Stack:
        original = model.forward
        model.__dict__["forward"] = lambda x, t, y: original(x.mul_(0.5), t, y)
        return model

    def outputs(model: nn.Module) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        noise, step = torch.randn(2, 2, 4, 3, generator=generator)
        samples: Sequence[Tensor] = [noise + 0.1 * k * step for k in range(4)]
        with torch.no_grad():
            return [tensor_of(model(x, 900.0 - 100 * k, torch.tensor([1, 2]))) for k, x in enumerate(samples)]

    model = cachekit.wrap(writing(CASE.build()), "every-2", segments="all", reuse="residual", audit_every=1)
    reused, true = outputs(model), outputs(writing(CASE.build()))
    assert [audit.error for audit in stats(model).audits] == pytest.approx([relative(reused[k], true[k]) for k in (1, 3)], rel=SAME)


@pytest.mark.parametrize("every", (0, -1, True, 1.0, "2"))
def test_wrong_numbers_are_refused(every: Any) -> None:
    with pytest.raises(ConfigError, match="audit_every"):
        cachekit.wrap(CASE.build(), audit_every=every)


def test_modules_inside_blocks_are_compared_one_by_one() -> None:
    """Every attention module of a step together; blocks run throughout, and the shadow's modules are no part of the counts."""
    model, full, ours, theirs = DIT.build(), DIT.build(), Seen(), Seen()
    cachekit.wrap(model, "every-2", segments="attn", audit_every=1)
    paths = [f"{block}.attn1" for block in DIT.stack]
    with torch.no_grad(), watching(model, paths, ours), watching(full, paths, theirs):
        generate(model, DIT, SCHEDULE)
        generate(full, DIT, SCHEDULE)
    n, expected = len(paths), []
    for step, record in enumerate(stats(model).records):
        reused = torch.cat([result[0].flatten() for _, _, result in ours[:n]])
        true = torch.cat([result[0].flatten() for _, _, result in theirs[step * n : (step + 1) * n]])
        del ours[: n if all(record.modules) else 2 * n]
        if not all(record.modules):
            expected.append(relative(reused, true))
    assert not ours and len(expected) == len(SCHEDULE) // 2
    assert [audit.sites[0].error for audit in stats(model).audits] == pytest.approx(expected, rel=SAME)


def test_what_a_policy_checks_is_not_taken_for_what_was_reused() -> None:
    """SpeCa's policy forecasts the block behind its segment as well; the audits are those of the segment alone."""
    found = []
    for policy in ("speca-1000", "first-3 | at-most-8"):
        model = cachekit.wrap(DIT.build(), policy, segments=(0, -1), reuse="grid-taylor-1", audit_every=1)
        with torch.no_grad():
            generate(model, DIT, SCHEDULE)
        found.append(stats(model).audits)
    assert len(found[0]) == len(SCHEDULE) - 3 and found[0] == found[1]
