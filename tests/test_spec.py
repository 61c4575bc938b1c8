"""Spec strings: what they parse to, how they combine, and what an unreadable one is told."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import generate
from zoo import DIT

import cachekit
from cachekit.policies import (
    POLICIES,
    ErrorBudget,
    accumulated,
    adacache,
    at_most,
    change,
    dbcache,
    delta_dit,
    duca,
    easycache,
    error_budget,
    every,
    fastercache,
    first,
    first_block,
    foca,
    fora,
    front_change,
    hicache,
    last,
    moved,
    outside,
    pab,
    since,
    skip_cache,
    skip_every,
    speca,
    tail,
    taylorseer,
    tgate,
    toca,
)
from cachekit.policies.adacache import CODEBOOK, paced
from cachekit.policies.delta_dit import stage
from cachekit.policies.easycache import predicted
from cachekit.policies.pab import broadcast
from cachekit.policies.reuses import Bdf, Frequencies, Hermite, Mix, TaylorSeer, Tokens
from cachekit.policies.speca import verified
from cachekit.policy import AllOf, AnyOf, Policy
from cachekit.preset import Preset
from cachekit.reuse import Forecast, parse_reuse
from cachekit.segments import Segment, Site, parse_segments
from cachekit.spec import parse_policy

LEAVES: list[tuple[str, Any]] = [
    ("every-2", every(2)),
    ("first-3", first(3)),
    ("first-0", first(0)),
    ("last-5", last(5)),
    ("tail", tail(0.06)),
    ("tail-0.1", tail(0.1)),
    ("at-most-4", at_most(4)),
    ("change-0.08", change(0.08)),
    ("change-5e-2", change(0.05)),
    ("change-1e-05", change(0.00001)),
    ("front-change-0.08", front_change(0.08)),
    ("moved-0.5", moved(0.5)),
    ("accumulated-0.2", accumulated(0.2)),
    ("accumulated-0.2", accumulated(0.2, signal="modulated", coefficients=(1.0, 0.0))),
    ("since-3", since(3)),
    ("outside-700-50", outside(700, 50)),
    ("outside-700", outside(700, 0)),
    ("outside-712.5-0.5", outside(712.5, 0.5)),
    ("N2-700-50", every(2) | outside(700, 50)),
    ("N-2-700-50", every(2) | outside(700, 50)),
]


@pytest.mark.parametrize(("spec", "policy"), LEAVES, ids=[spec for spec, _ in LEAVES])
def test_a_name_and_its_numbers(spec: str, policy: Any) -> None:
    assert parse_policy(spec) == Preset(policy)
    assert parse_policy(f"  {spec} ") == Preset(policy)


PAB = [Segment(modules=kind, policy=broadcast(n)) for kind, n in (("spatial_attn", 2), ("temporal_attn", 3), ("cross_attn", 6))]
TGATE = [
    Segment(modules="attn", policy=first(3) | every(2) | since(19)),
    Segment(modules="cross_attn", policy=first(20)),
]

FASTER = [
    Segment("uncond", policy=broadcast(5, 641, -1), reuse=Frequencies()),
    Segment(modules="attn", policy=broadcast(2, 681, -1) | broadcast(5, 641, -1)),
]

# A spec, the object that it means, and what that is made of.
PRESETS: list[tuple[str, Preset, Any, Any, Any]] = [
    ("first-block", first_block(0.05), change(0.05, pooled=True), (1, None), "residual"),
    ("first-block-0.1", first_block(0.1), change(0.1, pooled=True), (1, None), "residual"),
    ("dbcache", dbcache(8, 0, 0.08), first(8) | front_change(0.08, pooled=True), Segment(8), "residual"),
    ("dbcache-2-1-0.2", dbcache(2, 1, 0.2), first(8) | front_change(0.2, pooled=True), Segment(2, -1), "residual"),
    ("fora-4", fora(4), every(4) | last(1), "modules", "output"),
    ("toca-3-0.07", toca(3, 0.07), every(3), "modules", Tokens(0.07, period=3)),
    ("duca-4-0.05", duca(4, 0.05), every(4), "modules", Tokens(0.05, by="random", period=4, alternate=True)),
    ("fastercache-2-0", fastercache(2, 0), broadcast(2, 681, -1), "attn", Mix()),
    ("fastercache", fastercache(2, 5), broadcast(2, 681, -1) | broadcast(5, 641, -1), FASTER, Mix()),
    ("fastercache-3-4", fastercache(3, 4), broadcast(3, 681, -1) | broadcast(4, 641, -1), fastercache(3, 4).segments, Mix()),
    ("pab", pab(2, 3, 6, 800, 100), broadcast(2, 800, 100), PAB, "output"),
    ("tgate-20-2", tgate(20, 2), first(20), TGATE, "output"),
    ("taylorseer-5", taylorseer(5, 1), first(3) | at_most(4), "all", TaylorSeer(1, axis="grid")),
    ("taylorseer-3-2", taylorseer(3, 2), first(3) | at_most(2), "all", TaylorSeer(2, axis="grid")),
    ("hicache-3-1", hicache(3, 1), first(3) | at_most(2), "all", Hermite(1, 0.5, axis="grid")),
    ("hicache-3", hicache(3, 2), first(3) | at_most(2), "all", Hermite(2)),
    ("foca-3", foca(3), first(3) | at_most(2), "all", Bdf(2, axis="grid")),
    ("easycache", easycache(0.025), first(5) | last(1) | predicted(0.025), "model", "residual"),
    ("easycache-0.1", easycache(0.1), first(5) | last(1) | predicted(0.1), "model", "residual"),
    ("speca", speca(0.3), first(3) | at_most(8) | verified(0.3, 0.05, 0.01), (0, -1), TaylorSeer(1, axis="grid")),
    ("speca-2", speca(2.0), first(3) | at_most(8) | verified(2, 0.05, 0.01), (0, -1), TaylorSeer(1, axis="grid")),
    ("error-budget-0.02", error_budget(0.02), ErrorBudget(0.02), None, Forecast(order=2, bound=5.0, axis="grid")),
    ("error-budget-0.2-0.7", error_budget(0.2, 0.7), ErrorBudget(0.2, margin=0.7), None, Forecast(2, bound=5.0, axis="grid")),
    ("adacache", adacache(), last(2) | paced(tuple(CODEBOOK.items())), "all", "residual"),
    (
        "delta-dit-3-2-0.25",
        delta_dit(3, 2, 0.25),
        every(3),
        [
            cachekit.Segment(0, 2, policy=every(3) | stage(0.25)),
            cachekit.Segment(-2, None, policy=every(3) | stage(0.25, late=True)),
        ],
        "residual",
    ),
]


@pytest.mark.parametrize(("spec", "made", "policy", "segments", "reuse"), PRESETS, ids=[preset[0] for preset in PRESETS])
def test_presets(spec: str, made: Preset, policy: Any, segments: Any, reuse: Any) -> None:
    assert parse_policy(spec) == made == Preset(policy, segments, reuse)


# Tried on models, in test_for_model.py and test_teacache.py.
FOR_MODELS = {"magcache_published", "teacache"}


def test_every_known_policy_is_tried() -> None:
    tried = FOR_MODELS | {type(policy).__name__ for _, policy in LEAVES} | {"skip_cache", "skip_every"}
    tried |= {spec.rstrip("0123456789.-").replace("-", "_") for spec, *_ in PRESETS}
    assert {maker.__name__ for maker in POLICIES.values()} <= tried


def test_the_preset_brings_its_reuse() -> None:
    preset = parse_policy("skip-every-3")
    assert preset == skip_every(3)
    assert preset.policy == first(3) | (at_most(2) | tail(0.06)) & moved(0.5)
    assert preset.segments is None
    assert isinstance(preset.reuse, cachekit.Forecast)
    assert (preset.reuse.order, preset.reuse.bound) == (2, 5.0)


def test_objects_pass_through() -> None:
    assert parse_policy(every(2)) == Preset(every(2))
    assert parse_policy(skip_every(2)) is not None
    preset = Preset(every(2), segments="all", reuse="residual")
    assert parse_policy(preset) is preset
    assert skip_cache(2, 700, 50) == every(2) | outside(700, 50)


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("every-2|first-3", AnyOf(every(2), first(3))),
        ("every-2&first-3", AllOf(every(2), first(3))),
        ("every-2 | first-3 | last-1", AnyOf(AnyOf(every(2), first(3)), last(1))),
        ("every-2 | first-3 & last-1", AnyOf(every(2), AllOf(first(3), last(1)))),
        ("every-2 & first-3 | last-1", AnyOf(AllOf(every(2), first(3)), last(1))),
        ("(every-2 | first-3) & last-1", AllOf(AnyOf(every(2), first(3)), last(1))),
        ("every-2 & (first-3 | last-1)", AllOf(every(2), AnyOf(first(3), last(1)))),
        ("((every-2))", every(2)),
    ],
)
def test_combinations(spec: str, policy: Policy[Any]) -> None:
    assert parse_policy(spec).policy == policy


def test_a_preset_in_a_combination_keeps_its_reuse() -> None:
    for spec in (
        "skip-every-3 | outside-700-50",
        "outside-700-50 | skip-every-3",
        "skip-every-3 & every-2",
        "every-2 & skip-every-3",
    ):
        assert parse_policy(spec).reuse == skip_every(3).reuse
    assert parse_policy("skip-every-3 | skip-every-5").policy == AnyOf(skip_every(3).policy, skip_every(5).policy)


# Pairs that disagree on both, on the segments alone, and on the reuse alone.
BOTH = [("fora-3", "first-block-0.1"), ("taylorseer-3", "fora-2"), ("delta-dit-2-3", "speca"), ("fastercache", "hicache-3")]
WHERE = [("first-block-0.1", "delta-dit-2-3"), ("fora-3", "pab"), ("dbcache-2", "easycache")]
HOW = [("skip-every-3", "foca-3"), ("taylorseer-3", "hicache-3"), ("fora-3", "toca-3")]
JOINS: dict[str, Callable[[Any, Any], Any]] = {"|": operator.or_, "&": operator.and_}


def _sites(policy: Any, **options: Any) -> tuple[Site, ...]:
    found: tuple[Site, ...] = cachekit.wrap(DIT.build(), policy, **options).cachekit._engine.sites
    return found


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("pair", BOTH + WHERE + HOW, ids="-and-".join)
def test_presets_that_disagree_need_what_they_disagree_on(pair: tuple[str, str], join: str) -> None:
    """As a string and as objects, in either order: refused by name, and with wrap's own arguments one segment of both policies."""
    for a, b in (pair, pair[::-1]):
        first_, second = parse_policy(a), parse_policy(b)
        for policy in (f"{a} {join} {b}", JOINS[join](first_, second)):
            (site,) = _sites(policy, segments="middle", reuse="taylor-1")
            assert (site.segment, site.reuse) == (Segment(1, -1), Forecast(1))
            assert site.policy == JOINS[join](first_.policy, second.policy)
            if pair not in HOW:
                with pytest.raises(cachekit.ConfigError, match=r"two presets with different segments .*, or give segments="):
                    _sites(policy, reuse="output")
            if pair not in WHERE:
                with pytest.raises(cachekit.ConfigError, match=r"two presets with different reuse .*, or give reuse="):
                    _sites(policy, segments="middle")


@pytest.mark.parametrize("pair", WHERE)
def test_one_side_is_enough_where_they_disagree_on_one(pair: tuple[str, str]) -> None:
    a, b = pair
    (site,) = _sites(f"{a} | {b}", segments="all")
    assert (site.segment, site.reuse) == (Segment(), parse_reuse(parse_policy(a).reuse))


def test_the_other_side_is_kept_where_they_disagree_on_the_reuse() -> None:
    (site,) = _sites("taylorseer-3 | hicache-3", reuse="residual")
    assert (site.segment, site.reuse) == (Segment(), Forecast(beta=1.0))
    (site,) = _sites("taylorseer-3 | hicache-3", segments=Segment(1, 2, reuse="output"))
    assert site.reuse == Forecast()
    sites = _sites("every-2", segments=[Segment(1, 2, policy="taylorseer-3 | fora-3", reuse="output"), Segment(3, 4)])
    assert [site.reuse for site in sites] == [Forecast(), Forecast()]
    with pytest.raises(cachekit.ConfigError, match="two presets with different reuse"):
        _sites("every-2", segments=[Segment(1, 2, policy="taylorseer-3 | fora-3")])


def test_a_third_does_not_hide_that_two_disagree() -> None:
    for policy in ("fora-3 | taylorseer-3 | first-4", "first-4 & (fora-3 | taylorseer-3)", "(fora-3 | taylorseer-3) | hicache-3"):
        with pytest.raises(cachekit.ConfigError, match="two presets with different segments"):
            _sites(policy)
        with pytest.raises(cachekit.ConfigError, match="two presets with different reuse"):
            _sites(policy, segments="all")
        assert len(_sites(policy, segments="all", reuse="output")) == 1


def test_presets_that_say_the_same_in_other_words_agree() -> None:
    (site,) = _sites("first-block-0.1 | dbcache-1-0-0.2")
    assert site.segment == Segment(1)
    joined = Preset(every(2), "middle", "output") & Preset(every(3), (1, -1), Forecast())
    assert joined == Preset(every(2) & every(3), "middle", "output")


def test_both_policies_of_presets_that_disagree_are_asked() -> None:
    """FORA's period with First-Block Cache's threshold on the middle blocks: recomputed where either says so, from the model."""
    times = tuple(float(t) for t in range(950, 100, -70))

    def ran(policy: Any) -> list[bool]:
        model = cachekit.wrap(DIT.build(), policy, segments="middle", reuse="output")
        with torch.no_grad(), model.cachekit.session(steps=len(times)):
            generate(model, DIT, times)
        return [all(record.recomputed) for record in model.cachekit.stats.records]

    assert ran("fora-4 | first-block-9") == ran("fora-4") == [i % 4 == 0 or i == len(times) - 1 for i in range(len(times))]
    assert ran("fora-4 | first-block-0") == [True] * len(times)
    assert ran("fora-4 & first-block-9") == [i == 0 for i in range(len(times))]


def test_a_preset_in_a_combination_keeps_its_segments_and_joins_their_policies() -> None:
    for spec, combined in (
        ("first-block-0.1 | every-5", change(0.1, pooled=True) | every(5)),
        ("every-5 | first-block-0.1", every(5) | change(0.1, pooled=True)),
        ("first-block-0.1 & first-9", change(0.1, pooled=True) & first(9)),
    ):
        assert parse_policy(spec) == Preset(combined, (1, None), "residual")
    late = every(2) | stage(0.5, late=True)
    for spec, policy in (("delta-dit-2-3 | first-4", late | first(4)), ("first-4 & delta-dit-2-3", first(4) & late)):
        front, rear = parse_policy(spec).segments
        assert (front.start, front.stop, rear.start, rear.stop) == (0, 3, -3, None)
        assert parse_policy(rear.policy).policy == policy
    front, _ = (Preset(first(4)) & delta_dit(2, 3)).segments
    assert parse_policy(front.policy).policy == first(4) & (every(2) | stage(0.5))
    assert parse_policy("delta-dit-2-3 | delta-dit-2-3").segments == delta_dit(2, 3).segments


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(cachekit.ConfigError) as caught:
        parse_policy("evry-2")
    message = str(caught.value)
    assert "'evry-2'" in message
    for usage in (
        "every-N",
        "outside-START-CLOSE",
        "first-N",
        "last-N",
        "tail-SHARE",
        "at-most-N",
        "change-THRESHOLD",
        "skip-every-N",
        "NN-START-CLOSE",
        "front-change-THRESHOLD",
        "first-block-THRESHOLD",
        "dbcache-F-B-THRESHOLD",
        "taylorseer-N-ORDER",
        "hicache-N-ORDER",
        "foca-N",
        "delta-dit-N-BLOCKS-EARLY",
        "adacache",
    ):
        assert usage in message


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("every-0", "greater than 0"),
        ("every-1.5", "valid integer"),
        ("every", "every-N"),
        ("every-2-3", "every-N"),
        ("change--1", "unknown policy"),
        ("first-0.5", "valid integer"),
        ("skip-every-0", "greater than 0"),
        ("N2-700", "close"),
        ("first-block-0.1-2", "first-block-THRESHOLD"),
        ("dbcache-0", "greater than or equal to 1|greater than 0"),
        ("dbcache-8-0-0.08-8", "dbcache-F-B-THRESHOLD"),
        ("taylorseer", "taylorseer-N-ORDER"),
        ("taylorseer-0", "greater than 0"),
        ("taylorseer-3-0.5", "valid integer"),
        ("hicache-3-0.5", "valid integer"),
        ("foca-3-2", "foca-N"),
        ("delta-dit-3-0", "greater than 0"),
        ("delta-dit-3-2-1.5", "less than or equal to 1"),
        ("adacache-2", "adacache"),
        ("every-2 first-3", "from 'first-3' on"),
        ("every-2)", "from '\\)' on"),
        ("(every-2", "lacks a closing parenthesis"),
        ("every-2 |", "lacks a policy"),
        ("| every-2", "lacks a policy"),
        ("()", "lacks a policy"),
        ("", "lacks a policy"),
        ("   ", "lacks a policy"),
        ("every-2 || first-3", "lacks a policy"),
        ("2", "unknown policy"),
        ("change-1e400", "beyond all that can be counted with"),
    ],
)
def test_unreadable_specs(spec: str, says: str) -> None:
    with pytest.raises(cachekit.ConfigError, match=says):
        parse_policy(spec)


@pytest.mark.parametrize("policy", [None, 2, every, ["every-2"], 0.5])
def test_what_is_no_policy(policy: Any) -> None:
    with pytest.raises(cachekit.ConfigError, match=r"neither a spec string such as 'skip-every-2' nor a cachekit.Policy"):
        parse_policy(policy)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: every(0), "every.*greater than 0"),
        (lambda: every(n=1.5), "every.*valid integer"),  # type: ignore[arg-type]
        (lambda: outside(-1, 0), "outside.*greater than or equal to 0"),
        (lambda: change(float("-inf")), "change.*greater than or equal to 0"),
        (lambda: first(-1), "first.*greater than or equal to 0"),
    ],
)
def test_policies_refuse_numbers_that_make_no_sense(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){says}"):
        make()


def _numbers() -> st.SearchStrategy[float]:
    return st.one_of(st.integers(0, 2000), st.floats(0, 2000, allow_nan=False).map(abs))


def _text(value: float) -> str:
    return repr(value)


leaves = st.one_of(
    st.integers(1, 99).map(lambda n: (f"every-{n}", every(n))),
    st.integers(0, 99).map(lambda n: (f"first-{n}", first(n))),
    st.integers(0, 99).map(lambda n: (f"last-{n}", last(n))),
    st.integers(0, 99).map(lambda n: (f"at-most-{n}", at_most(n))),
    st.floats(0, 1).map(lambda x: (f"tail-{_text(abs(x))}", tail(abs(x)))),
    st.floats(0, 1e6).map(lambda x: (f"change-{_text(abs(x))}", change(abs(x)))),
    st.tuples(_numbers(), _numbers()).map(lambda w: (f"outside-{_text(w[0])}-{_text(w[1])}", outside(*w))),
)
trees: st.SearchStrategy[tuple[str, Any]] = st.recursive(
    leaves,
    lambda inner: st.tuples(inner, st.sampled_from("|&"), inner).map(
        lambda p: (f"({p[0][0]} {p[1]} {p[2][0]})", p[0][1] | p[2][1] if p[1] == "|" else p[0][1] & p[2][1])
    ),
    max_leaves=8,
)


@given(trees)
def test_any_combination_reads_as_it_was_written(tree: tuple[str, Any]) -> None:
    spec, policy = tree
    assert parse_policy(spec).policy == policy


def _show(policy: Policy[Any]) -> str:
    """Without parentheses where precedence does without them."""
    if isinstance(policy, AnyOf):
        right = _show(policy.b)
        return f"{_show(policy.a)} | {f'({right})' if isinstance(policy.b, AnyOf) else right}"
    if isinstance(policy, AllOf):
        left, right = _show(policy.a), _show(policy.b)
        return (f"({left})" if isinstance(policy.a, AnyOf) else left) + " & " + (f"({right})" if not _is_leaf(policy.b) else right)
    return str(next(spec for spec, leaf in SIMPLE if leaf == policy))


def _is_leaf(policy: Policy[Any]) -> bool:
    return not isinstance(policy, AnyOf | AllOf)


SIMPLE: list[tuple[str, Policy[Any]]] = [
    ("every-2", every(2)),
    ("first-3", first(3)),
    ("last-1", last(1)),
    ("outside-700-50", outside(700, 50)),
]
minimal: st.SearchStrategy[Policy[Any]] = st.recursive(
    st.sampled_from([policy for _, policy in SIMPLE]),
    lambda inner: st.tuples(inner, st.booleans(), inner).map(lambda p: p[0] | p[2] if p[1] else p[0] & p[2]),
    max_leaves=8,
)


@given(minimal)
def test_precedence_is_that_of_python(policy: Policy[Any]) -> None:
    text = _show(policy)
    assert parse_policy(text).policy == policy
    as_python = text
    for spec, _ in SIMPLE:
        name, *numbers = spec.split("-")
        as_python = as_python.replace(spec, f"{name}({', '.join(numbers)})")
    assert eval(as_python, {"every": every, "first": first, "last": last, "outside": outside}) == policy


@pytest.mark.parametrize(
    ("spec", "order", "beta", "axis"),
    [
        ("output", 0, 0.0, "t"),
        ("residual", 0, 1.0, "t"),
        ("taylor-1", 1, 0.0, "t"),
        ("taylor-3", 3, 0.0, "t"),
        ("residual-taylor-2", 2, 1.0, "t"),
        ("grid-taylor-2", 2, 0.0, "grid"),
        ("residual-grid-taylor-1", 1, 1.0, "grid"),
        ("grid-residual-taylor-1", 1, 1.0, "grid"),
    ],
)
def test_reuse_specs(spec: str, order: int, beta: float, axis: str) -> None:
    assert parse_reuse(spec) == cachekit.Forecast(order=order, beta=beta, axis=axis)  # type: ignore[arg-type]


@pytest.mark.parametrize("reuse", ["outputs", "taylor-x", "residual-", 2, None])
def test_unknown_reuse_lists_the_known(reuse: Any) -> None:
    with pytest.raises(cachekit.ConfigError, match=r"unknown reuse.*'output', 'residual', 'taylor-K', 'residual-taylor-K'"):
        parse_reuse(reuse)


@pytest.mark.parametrize(
    ("segments", "found"),
    [
        (None, [(1, -1)]),
        ("middle", [(1, -1)]),
        ("all", [(None, None)]),
        ("skip-0", [(0, None)]),
        ("skip-3", [(3, -3)]),
        ("model", [("model", None)]),
        ((2, 5), [(2, 5)]),
        ((None, -1), [(None, -1)]),
        (range(2, 5), [(2, 5)]),
        (slice(None, 4), [(None, 4)]),
        ([(1, 4), (4, 7)], [(1, 4), (4, 7)]),
        (["middle"], [(1, -1)]),
    ],
)
def test_segments(segments: Any, found: list[tuple[Any, Any]]) -> None:
    assert [(segment.start, segment.stop) for segment in parse_segments(segments)] == found


@pytest.mark.parametrize("segments", ["midle", "skip-", "skip--1", 3, [], (), (1, 2, 3), (1.0, 2.0), range(0, 8, 2), (True, False)])
def test_unknown_segments_say_what_there_is(segments: Any) -> None:
    with pytest.raises(cachekit.ConfigError, match="segments="):
        parse_segments(segments)
