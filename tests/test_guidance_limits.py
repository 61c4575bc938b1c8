"""Rebuilding one pass of guidance: random stacks, orders of calls, what can't be known, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Shape
from drawing import At, forecasts, heun, policies, reuses, schedules, stack_specs
from guided import DOUBLE, batch_of, half_of, in_one_batch, rebuilt, separately
from hypothesis import given, settings
from hypothesis import strategies as st
from in_batch import same
from running import assert_equal, generate
from stack_blocks import StackSpec
from stack_runs import Run, conditioning, given_time, samples, tensor_of
from stacks import build, visits_of
from torch import Tensor, nn
from wrapping import segments, stats
from zoo import DIT, FLUX, WAN

import cachekit
from cachekit import ConfigError, Segment
from cachekit.policies import change, error_budget, every, first_block, toca
from cachekit.policies.reuses import Frequencies

TIMES = tuple(float(t) for t in range(950, 200, -100))
HELD = Frequencies(1.0, 1.0)
RAN = "no conditional pass had run before it"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def shape_of(batch: int) -> Shape:
    return Shape(batch, DOUBLE)


def recomputed(model: Any) -> list[bool]:
    """Of each call, whether every block ran."""
    return [all(record.recomputed) for record in model.cachekit.stats.records]


# As in the tests of decisions for each sample: those that can be split.
specs = stack_specs().map(lambda spec: replace(spec, in_place=frozenset(), extras=0, tokens=max(spec.tokens, 4)))


@settings(max_examples=60)
@given(specs, schedules(max_size=8), st.integers(0, 9), st.integers(1, 2), st.sampled_from(("first", "last")), st.data())
def test_one_batch_is_as_two_calls(
    spec: StackSpec, times: tuple[float, ...], seed: int, n: int, which: Any, data: st.DataObject
) -> None:
    """Any stack, with any segments of blocks beside the pass, any reuses and policies of either: they run where both passes do."""
    both = At(data.draw(st.frozensets(st.integers(0, len(times) - 1))))
    depth = len(visits_of(build(spec)))
    where = data.draw(st.none() | segments(depth, model=False))
    reuse, beside = data.draw(reuses()), data.draw(forecasts((0.0, 1.0)))
    policy = data.draw(policies()) | both
    within = [] if where is None else [where] if not isinstance(where, list) else where
    within = [replace(each, policy=policy) for item in within for each in cachekit.segments.parse_segments(item)]
    put = [Segment("uncond", policy=both, reuse=beside), *within]
    run = Run(times, seed, n, dtype=DOUBLE)
    xs, ys = samples(build(spec), run), [conditioning(spec, n, seed + k) for k in (0, 1)]
    ys = [y.double() if y.is_floating_point() else y for y in ys]
    order = (0, 1) if which == "first" else (1, 0)
    together: Any = cachekit.wrap(build(spec).double(), segments=put, reuse=reuse, cond=which)
    apart: Any = cachekit.wrap(build(spec).double(), segments=put, reuse=reuse)
    with together.cachekit.session(timesteps=times), apart.cachekit.session(timesteps=times):
        for t, x in zip(times, xs, strict=True):
            y = torch.cat([ys[k] for k in order])
            found = tensor_of(together(torch.cat([x, x]), given_time(spec, t, 2 * n), y)).chunk(2)
            for k, name in enumerate(("cond", "uncond")):
                with apart.cachekit.branch(name):
                    assert same(found[order.index(k)], tensor_of(apart(x, given_time(spec, t, n), ys[k])))
    assert not any("pass" in note for note in (*stats(together).notes, *stats(apart).notes))


@settings(max_examples=20)
@given(st.sampled_from((0.01, 0.1, 0.3)), st.booleans(), st.sampled_from(("first", "last")))
def test_segments_that_look_at_the_model_see_the_conditional_half(threshold: float, pooled: bool, which: Any) -> None:
    """A threshold on the first block beside the pass, against the same in separate calls."""
    both = At(frozenset({0, 3, 4}))
    put = [Segment("uncond", policy=both, reuse=HELD), Segment(1, None, policy=change(threshold, pooled=pooled) | both)]
    apart = cachekit.wrap(DIT.build().double(), segments=put, reuse="residual")
    cond = 0 if which == "first" else 1
    halves = (cond, 1 - cond)
    conditionings = [half_of(DIT.conditioning(0, shape_of(4)), half, 2) for half in halves]
    together = cachekit.wrap(DIT.build().double(), segments=put, reuse="residual", cond=which)
    whole = in_one_batch(DIT, together, TIMES, 2)
    for i, t in enumerate(TIMES):
        given = DIT.inputs(t, 2, 0, DOUBLE, conditioning={}, start=TIMES[0])
        for half, name, more in zip(halves, ("cond", "uncond"), conditionings, strict=True):
            with apart.cachekit.branch(name):
                assert same(half_of(whole[i], half, 2), DIT.output(apart(**given, **more)))
    records = [record.recomputed for record in apart.cachekit.stats.records if record.branch == "cond"]
    assert [record.recomputed for record in together.cachekit.stats.records] == records


@given(st.lists(st.sampled_from(((0, 1), (1, 0), (0,), (1,))), min_size=2, max_size=len(TIMES)), st.integers(1, 4))
@settings(max_examples=25)
def test_orders_of_calls(orders: list[tuple[int, ...]], n: int) -> None:
    """A pass that comes before the conditional one, or alone, runs, and it is noted; the next is not rebuilt from older ones."""
    times = TIMES[: len(orders)]
    model = cachekit.wrap(DIT.build().double(), every(n), segments="uncond", reuse=HELD)
    plain = separately(DIT, DIT.build().double(), times, 1, lambda i: orders[i])
    found = separately(DIT, model, times, 1, lambda i: orders[i], name=lambda k: model.cachekit.branch(("cond", "uncond")[k]))
    assert all(a.equal(b) for a, b in zip(found[0], plain[0], strict=True))
    difference, seen = None, 0
    conds = iter(plain[0])
    for order in orders:
        c = next(conds) if 0 in order else None
        if 1 not in order:
            continue
        u = plain[1][seen]
        if order != (0, 1) or c is None:
            difference, expected = None, u
        elif difference is None or seen % n == 0:
            difference, expected = u - c, u
        else:
            expected = c + difference
        assert same(found[1][seen], expected)
        seen += 1
    noted = any(RAN in note for note in model.cachekit.stats.notes)
    assert noted == any(order in ((1, 0), (1,)) for order in orders)


def test_the_first_called_is_the_conditional_one_where_that_is_said() -> None:
    """And stays it, where the order changes later."""
    orders = [(0, 1), (0, 1), (1, 0), (0, 1), (0, 1)]
    times = TIMES[:5]
    model = cachekit.wrap(WAN.build().double(), every(9), segments="uncond", reuse=HELD, cond="before")
    plain = separately(WAN, WAN.build().double(), times, 1, lambda i: orders[i])
    found = separately(WAN, model, times, 1, lambda i: orders[i])
    both = frozenset({0, 2, 3})
    assert all(a.equal(b) for a, b in zip(found[0], plain[0], strict=True))
    for a, b in zip(found[1], rebuilt(plain[0], plain[1], times, lambda i, _: i in both, lambda d, _: d), strict=True):
        assert same(a, b)
    assert any(RAN in note for note in model.cachekit.stats.notes)


def test_the_same_sample_at_two_timesteps() -> None:
    """The conditional pass of another timestep is none of this one."""
    model: Any = cachekit.wrap(DIT.build().double(), every(9), segments="uncond", reuse=HELD)
    plain, x = DIT.build().double(), DIT.sample(900.0, 0, shape_of(1))
    calls = ((900, "cond"), (900, "uncond"), (800, "cond"), (700, "uncond"))
    with model.cachekit.session(steps=3):
        for t, name in calls:
            given = {
                "hidden_states": x,
                "timestep": torch.tensor([t]),
                "class_labels": torch.tensor([3 if name == "cond" else 1000]),
            }
            with model.cachekit.branch(name):
                assert DIT.output(model(**given)).equal(DIT.output(plain(**given)))
    assert any(RAN in note for note in stats(model).notes)


def test_blocks_beside_a_pass_run_wherever_both_passes_do() -> None:
    """In one batch, whatever their own policy says: what they hold is the conditional half's."""
    both, often = At(frozenset({0, 3, 5})), At(frozenset({0, 4}))
    put = [Segment("uncond", policy=both, reuse=HELD), Segment(policy=often)]
    model = cachekit.wrap(DIT.build().double(), segments=put, cond="last")
    found, plain = (in_one_batch(DIT, each, TIMES, 2) for each in (model, DIT.build().double()))
    assert all(found[i].equal(plain[i]) for i in (0, 3, 5)) and same(found[4].chunk(2)[1], plain[4].chunk(2)[1])
    assert [sum(record.shares or record.recomputed) / 6 for record in stats(model).records] == [1, 0, 0, 1, 0.5, 1, 0, 0]


def test_passes_without_names() -> None:
    """Which is the conditional one is never guessed."""
    model = cachekit.wrap(WAN.build(), every(3), segments="uncond", reuse=HELD)
    found, plain = (separately(WAN, each.double(), TIMES, 1, lambda _: (0, 1)) for each in (model, WAN.build()))
    assert all(a.equal(b) for k in (0, 1) for a, b in zip(found[k], plain[k], strict=True))
    assert all(recomputed(model)) and any(RAN in note for note in stats(model).notes)


def test_one_batch_where_nothing_was_said() -> None:
    """As before, it is a pass that has no other."""
    model = cachekit.wrap(DIT.build(), "fastercache").double()
    in_one_batch(DIT, model, TIMES, 2)
    assert all(recomputed(model)) and any(RAN in note for note in stats(model).notes)
    assert stats(model).modules_run < stats(model).modules_total


def test_a_solver_with_two_evaluations_at_one_timestep() -> None:
    """The second evaluation's pass is rebuilt from the second evaluation of the other."""
    times = heun((900.0, 700.0, 500.0))
    model = cachekit.wrap(WAN.build().double(), At(frozenset({0})), segments="uncond", reuse=HELD)
    plain, conditionings = WAN.build().double(), [WAN.conditioning(k, shape_of(4)) for k in (0, 1)]
    difference = None
    with model.cachekit.session(timesteps=times):
        for i, t in enumerate(times):
            sample = WAN.inputs(t - 20 * (i % 2 == 0 and i > 0), 4, 0, DOUBLE, conditioning={}, start=900.0)
            sample["timestep"] = WAN.inputs(t, 4, 0, DOUBLE, conditioning={}, start=900.0)["timestep"]
            cond, uncond = (WAN.output(plain(**sample, **more)) for more in conditionings)
            found = []
            for name, more in zip(("cond", "uncond"), conditionings, strict=True):
                with model.cachekit.branch(name):
                    found.append(WAN.output(model(**sample, **more)))
            difference = uncond - cond if difference is None else difference
            assert found[0].equal(cond) and same(found[1], cond + difference)
    assert recomputed(model)[1::2] == [True, False, False, False, False]


def test_two_passes_of_one_name() -> None:
    """Guidance by two prompts, both called "cond": which of them is meant can't be known."""
    model, plain = cachekit.wrap(WAN.build().double(), every(5), segments="uncond", reuse=HELD), WAN.build().double()
    for t in TIMES:
        x = WAN.sample(t, shape=shape_of(1), start=TIMES[0])
        for prompt, name in ((0, "cond"), (2, "cond"), (1, "uncond")):
            inputs = {"hidden_states": x, "timestep": WAN.timestep(t, shape_of(1)), **WAN.conditioning(prompt, shape_of(1))}
            with model.cache_context(name):
                assert WAN.output(model(**inputs)).equal(WAN.output(plain(**inputs)))
    assert stats(model).generations == 1
    assert [RAN in note for note in stats(model).notes] == [True]


def test_three_passes() -> None:
    """Perturbed guidance: each of the others is rebuilt with a difference of its own."""
    conditionings = [WAN.conditioning(k, shape_of(4)) for k in range(3)]
    model, plain = cachekit.wrap(WAN.build().double(), every(9), segments="uncond", reuse=HELD), WAN.build().double()
    differences: list[Tensor] = []
    for i, t in enumerate(TIMES):
        given = WAN.inputs(t, 4, 0, DOUBLE, conditioning={}, start=TIMES[0])
        cond, *others = (WAN.output(plain(**given, **more)) for more in conditionings)
        differences = differences or [other - cond for other in others]
        for k, (name, more) in enumerate(zip(("cond", "uncond", "perturbed"), conditionings, strict=True)):
            with model.cachekit.branch(name):
                found = WAN.output(model(**given, **more))
            assert same(found, cond if not k else others[k - 1] if not i else cond + differences[k - 1])


def test_a_sampler_that_writes_into_what_it_gets() -> None:
    plain = separately(WAN, WAN.build().double(), TIMES, 1, lambda _: (0, 1))
    model = cachekit.wrap(WAN.build().double(), every(4), segments="uncond", reuse="frequencies")
    quiet = cachekit.wrap(WAN.build().double(), every(4), segments="uncond", reuse="frequencies")
    expected = separately(WAN, quiet, TIMES, 1, lambda _: (0, 1), name=lambda k: quiet.cachekit.branch(("cond", "uncond")[k]))
    conditionings = [half_of(WAN.conditioning(0, shape_of(2)), half, 1) for half in (0, 1)]
    for i, t in enumerate(TIMES):
        given = WAN.inputs(t, 1, 0, DOUBLE, conditioning={}, start=TIMES[0])
        for k, more in enumerate(conditionings):
            with model.cachekit.branch(("cond", "uncond")[k]):
                found = WAN.output(model(**given, **more))
            assert found.equal(expected[k][i])
            found.zero_()
    assert not any(a.equal(b) for a, b in zip(expected[1][1:4], plain[1][1:4], strict=True))


def test_halves_of_other_samples() -> None:
    """Two prompts without guidance fill a batch as two passes do. They are two samples."""
    model, plain = cachekit.wrap(DIT.build().double(), every(3), segments="uncond", reuse=HELD, cond="last"), DIT.build().double()
    more = DIT.conditioning(0, shape_of(4))
    for t in TIMES:
        given = DIT.inputs(t, 4, 0, DOUBLE, conditioning=more, start=TIMES[0])
        assert DIT.output(model(**given)).equal(DIT.output(plain(**given)))
    assert all(recomputed(model)) and any("halves of the sample differ" in note for note in stats(model).notes)


def test_halves_that_come_to_differ() -> None:
    model, plain = cachekit.wrap(DIT.build().double(), every(9), segments="uncond", reuse=HELD, cond="last"), DIT.build().double()
    more = DIT.conditioning(0, shape_of(2))
    shares = []
    for i, t in enumerate(TIMES):
        given = batch_of(DIT, t, 1, TIMES[0])
        if i == 4:
            given["hidden_states"][0] += 0.01
        result = DIT.output(model(**given, **more))
        shares.append(bool(stats(model).records[-1].shares))
        if i in (0, 4):
            assert result.equal(DIT.output(plain(**given, **more)))
    # Behind it nothing is stored.
    assert shares == [i not in (0, 4, 5) for i in range(len(TIMES))]
    assert any("halves of the sample differ" in note for note in stats(model).notes)


def test_an_odd_batch() -> None:
    model = cachekit.wrap(DIT.build().double(), every(3), segments="uncond", reuse=HELD, cond="first")
    more = DIT.conditioning(0, shape_of(3))
    for t in TIMES[:3]:
        model(**DIT.inputs(t, 3, 0, DOUBLE, conditioning=more, start=TIMES[0]))
    assert all(recomputed(model)) and any("odd number" in note for note in stats(model).notes)


class Mixing(nn.Module):
    """A model whose passes are not independent."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        x = x + y
        return x + torch.tanh(self.layer(x)) + x.mean(0, keepdim=True)


def test_a_model_that_mixes_the_passes() -> None:
    model, fresh = cachekit.wrap(Mixing(), every(3), segments="uncond", reuse=HELD, cond="last"), Mixing()
    fresh.load_state_dict(model.state_dict())
    x, y = torch.randn(1, 5, 4).repeat(2, 1, 1), torch.randn(2, 5, 4)
    for t in (900, 800, 700):
        given = x + t / 1000, torch.full((2,), t), y
        assert model(*given).equal(fresh(*given))
    assert any("can't be known" in note for note in stats(model).notes)


class Casting(nn.Module):
    """A model that computes in its weights' dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        x = (x + y).to(self.layer.weight.dtype)
        return x + torch.tanh(self.layer(x))


@pytest.mark.parametrize("which", ("last", None))
def test_another_dtype_drops_what_is_stored(which: Any) -> None:
    """In either manner: the step is begun again in full."""
    fresh = Casting()
    model: Any = cachekit.wrap(Casting(), every(9), segments="uncond", reuse=HELD, cond=which)
    fresh.load_state_dict(model.state_dict())
    x, ys = torch.randn(1, 5, 4), torch.randn(2, 5, 4)
    ran = []
    for i, t in enumerate((900.0, 800.0, 700.0, 600.0)):
        if i == 2:
            model.double()
            fresh.double()
        moved, time = x + t / 1000, torch.full((1,), t)
        expected = [fresh(moved, time, y[None]) for y in ys]
        if which:
            found = list(model(torch.cat([moved, moved]), time.expand(2), ys).chunk(2))
        else:
            found = []
            for k in (1, 0):
                with model.cachekit.branch(("uncond", "cond")[k]):
                    found.insert(0, model(moved, time, ys[k][None]))
        ran.append(torch.allclose(found[0], expected[0], rtol=1e-6, atol=1e-6))
        assert found[0].dtype is expected[0].dtype and torch.allclose(found[1], expected[1], rtol=1e-6, atol=1e-6)
    assert ran[0] and ran[2] and not ran[1] and not ran[3]
    assert dict(stats(model).dropped) == {"another shape, dtype or device": 1}


class Telling(Casting):
    """A model that returns something more where it is asked to."""

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, more: bool = False) -> Any:
        x = super().forward(x, timestep, y)
        return (x, x.mean(-1)) if more else x


def test_passes_that_return_other_tensors() -> None:
    model: Any = cachekit.wrap(Telling(), every(9), segments="uncond", reuse=HELD)
    fresh = Telling()
    fresh.load_state_dict(model.state_dict())
    x, ys = torch.randn(1, 5, 4), torch.randn(2, 1, 5, 4)
    for t in (900.0, 800.0, 700.0):
        given = x + t / 1000, torch.full((1,), t)
        with model.cachekit.branch("cond"):
            model(*given, ys[0])
        with model.cachekit.branch("uncond"):
            found = model(*given, ys[1], more=True)
        assert all(a.equal(b) for a, b in zip(found, fresh(*given, ys[1], more=True), strict=True))
    assert any("return other tensors" in note for note in stats(model).notes)


@pytest.mark.parametrize("which", ("first", "before"))
def test_inference_mode(which: Any) -> None:
    """Whose tensors can't be written into later, and don't tell whether somebody did."""
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        model = cachekit.wrap(DIT.build().double(), "fastercache", cond=which)
        with mode():
            if which == "first":
                found.append(in_one_batch(DIT, model, TIMES, 1))
            else:
                found.append([each for one in separately(DIT, model, TIMES, 1, lambda _: (0, 1)) for each in one])
        assert stats(model).blocks_run < stats(model).blocks_total and not stats(model).notes
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_frequencies_need_height_and_width() -> None:
    model: Any = cachekit.wrap(FLUX.build().double(), every(3), segments="uncond", reuse=Frequencies(), cond="last")
    more = FLUX.conditioning(0, shape_of(2))
    with pytest.raises(ConfigError, match="no height and width"):
        for t in TIMES:
            model(**batch_of(FLUX, t, 1, TIMES[0]), **more)
    held = cachekit.wrap(FLUX.build().double(), every(3), segments="uncond", reuse=HELD, cond="last")
    in_one_batch(FLUX, held, TIMES, 1)
    assert any(record.shares for record in stats(held).records)


def test_an_audit_of_a_rebuilt_pass() -> None:
    model = cachekit.wrap(DIT.build().double(), every(4), segments="uncond", reuse=HELD, audit_every=1)
    name = {"name": lambda k: model.cachekit.branch(("cond", "uncond")[k])}
    found = separately(DIT, model, TIMES, 1, lambda _: (0, 1), **name)
    plain = separately(DIT, DIT.build().double(), TIMES, 1, lambda _: (0, 1))
    audits = stats(model).audits
    assert [audit.branch for audit in audits] == ["uncond"] * 6 and all(audit.sites[0].predicted is None for audit in audits)
    steps = [i for i in range(len(TIMES)) if i % 4]
    for i, audit in zip(steps, audits, strict=True):
        error = (found[1][i] - plain[1][i]).norm() / plain[1][i].norm()
        assert audit.error == pytest.approx(float(error), rel=1e-9)


class Carrying(Frequencies):
    """One that carries a forecast."""

    @property
    def length(self) -> int:
        return 2


REFUSED: Sequence[tuple[dict[str, Any], str]] = (
    ({"segments": "uncond", "cond": "middle"}, "cond='middle': write 'first' or 'last'"),
    ({"cond": "last"}, "no segment is 'uncond'"),
    ({"segments": "middle", "reuse": "frequencies"}, "give it segments='uncond'"),
    ({"segments": "model", "reuse": "frequencies"}, "give it segments='uncond'"),
    ({"segments": "uncond", "reuse": Carrying()}, "give it segments='uncond'"),
    ({"segments": ["uncond", "model"]}, "twice"),
    ({"segments": "uncond", "policy": error_budget(0.1)}, "no error is estimated"),
    ({"segments": "uncond", "per_sample": 2}, "per_sample"),
    ({"segments": "uncond", "cond": "last", "audit_every": 1}, "not audited"),
    ({"segments": ["uncond", Segment(modules="mlp", policy=toca(3), reuse=toca(3).reuse)], "cond": "last"}, "tokens"),
    ({"segments": "uncond", "policy": first_block(0.1)}, "change"),
)


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cachekit.wrap(DIT.build(), **{"policy": "every-2", **options})


def test_windows_that_are_empty() -> None:
    with pytest.raises(ValueError, match="low_start=99"):
        Frequencies(low_start=99)
    with pytest.raises(ValueError, match="high_start=0, high_close=0"):
        Frequencies(high_start=0, high_close=0)


@pytest.mark.parametrize("reuse", ["output", "taylor-1", "residual"])
def test_passes_without_names_are_not_taken_for_the_unconditional_one(reuse: str) -> None:
    """Neither of separate calls is known to be it, nor is a batch of both: all run, and notes say what to write."""
    plain, model = DIT.build(), cachekit.wrap(DIT.build(), "every-2", segments="uncond", reuse=reuse)
    assert_equal(generate(model, DIT, TIMES), generate(plain, DIT, TIMES))
    prompts = [DIT.conditioning(seed) for seed in (0, 3)]
    for t in TIMES:
        for prompt in prompts:
            given = DIT.inputs(t, conditioning=prompt, start=TIMES[0])
            assert_equal([DIT.output(model(**given))], [DIT.output(plain(**given))])
    assert any(RAN in note for note in model.cachekit.stats.notes)
