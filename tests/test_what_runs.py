"""Inside a segment blocks are not called; outside it nothing changes. Counted, not assumed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from drawing import runs
from hypothesis import given
from stack_runs import Run, advance, calls_of_one, conditioning, given_time, noise, tensor_of
from stacks import blocks_of, calls, visits_of
from torch import Tensor, nn
from wrapping import Case, cases, covered, stats


@given(cases(), runs)
def test_blocks_in_a_segment_are_not_called_and_all_others_are(case: Case, run: Run) -> None:
    """What stats say of each visit is what the blocks themselves counted, and their totals are its sums."""
    model = case.wrap()
    visits = visits_of(model)
    inside = covered(case.segments, len(visits))
    usual = calls_of_one(case.spec)
    with torch.no_grad(), case.session(model, run.times):
        before = calls(model)
        for i, _ in enumerate(run.steps(model)):
            recomputed = stats(model).records[-1].recomputed
            assert len(recomputed) == len(visits)
            assert i > 0 or all(recomputed)
            assert all(recomputed) or all(recomputed[v] for v in range(len(visits)) if v not in inside)
            assert case.segments != "model" or len(set(recomputed)) == 1
            after = calls(model)
            for k, block in enumerate(blocks_of(model)):
                mine = sum(recomputed[v] for v, visited in enumerate(visits) if visited is block)
                # A block in the middle of a U stands in no list, and runs wherever the model does.
                lone = usual[k] if case.segments != "model" or any(recomputed) else 0
                assert after[k] - before[k] == (mine if block in visits else lone)
            before = after
    assert stats(model).steps == len(run.times)
    assert stats(model).blocks_total == len(run.times) * len(visits)
    assert stats(model).blocks_run == sum(sum(record.recomputed) for record in stats(model).records)


@dataclass
class _Call:
    """One call of one block, seen from outside: what went in and what came out, as copies, and whether it ran."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ran: bool
    result: Any


class _Observer:
    """Notes every call of a model's blocks, reused ones too."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[_Call] = []
        self.counted = 0
        for block in blocks_of(model):
            block.register_forward_pre_hook(self._before, with_kwargs=True)
            block.register_forward_hook(self._after)

    def _before(self, block: Any, args: Any, kwargs: Any) -> None:
        self.counted = block.calls
        self.seen.append(_Call(block, copy.deepcopy(args), copy.deepcopy(kwargs), False, None))

    def _after(self, block: Any, args: Any, result: Any) -> None:
        call = self.seen[-1]
        call.ran, call.result = block.calls > self.counted, copy.deepcopy(result)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and _same(list(a.values()), list(b.values()))
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(_same(p, q) for p, q in zip(a, b, strict=True))
    return bool(a == b)


@given(cases(model=False), runs)
def test_outside_a_segment_nothing_changes(case: Case, run: Run) -> None:
    """Every block that runs gives what the plain one gives for the same arguments, and those in front of all segments get them."""
    model, plain = case.wrap(), case.build()
    twins = dict(zip(blocks_of(model), blocks_of(plain), strict=True))
    visits = visits_of(model)
    inside = covered(case.segments, len(visits))
    ours, theirs = _Observer(model), _Observer(plain)
    x, y = noise(case.spec, run.batch, run.seed), conditioning(case.spec, run.batch, run.seed)
    with torch.no_grad(), case.session(model, run.times):
        for t in run.times:
            time = given_time(case.spec, t, run.batch)
            prediction = tensor_of(model(x, time, y))
            plain(x, time, y)
            # Every block is called as often and in the same order, though not every one runs.
            assert [twins[call.block] for call in ours.seen] == [call.block for call in theirs.seen]  # type: ignore[index]
            untouched = min(inside, default=len(visits))
            for call, expected in zip(ours.seen, theirs.seen, strict=True):
                untouched -= call.block in visits
                if untouched >= 0:
                    assert _same((call.args, call.kwargs, call.result), (expected.args, expected.kwargs, expected.result))
            assert not inside or any(call.ran for call in ours.seen) or len(inside) == len(visits)
            for call in [call for call in ours.seen if call.ran]:
                twin = twins[call.block]  # type: ignore[index]
                assert _same(call.result, type(twin).forward(twin, *call.args, **call.kwargs))
            ours.seen.clear()
            theirs.seen.clear()
            x = advance(x, prediction, 50)
