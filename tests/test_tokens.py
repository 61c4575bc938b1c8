"""Tokens computed anew on reused steps, against a loop that runs every module and writes rows over; and FasterCache's mix."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import Case, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_modules import NAMES, Held, paths, run
from running import assert_equal, generate
from test_modules import close, ours, period
from torch import Tensor, nn
from toys import Gated, Mixer, sample, toy, usual
from zoo import DIT, FLUX, LATTE, PIXART, WAN

import cachekit
from cachekit import ConfigError, Forecast, Segment, Step
from cachekit.policies import duca, every, fastercache, toca
from cachekit.policies.reuses import Mix, Tokens

TIMES = tuple(float(t) for t in range(950, 200, -80))
HALF = Tokens(0.5)
# The width of a head, and for each MLP the layer that makes the value vectors of its tokens.
HEADS = {WAN.name: 12}
HEAD = 16
VALUES = {
    DIT.name: {"ff": "attn1.to_v"},
    PIXART.name: {"ff": "attn1.to_v"},
    LATTE.name: {"ff": "attn1.to_v"},
    WAN.name: {"ffn": "attn1.to_v"},
    FLUX.name: {"ff": "attn.to_v", "ff_context": "attn.add_v_proj", "proj_mlp": "attn.to_v"},
}
BY = ("norm", "value", "similarity", "random")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def scores(reuse: Tokens, entering: Tensor, held: Tensor, i: int, values: Sequence[Tensor] = ()) -> list[float]:
    """Of the tokens of one sample, as the docstring has them.

    Args:
        entering, held: (tokens, width) each.
        values: of each head (tokens, width).
    """
    if reuse.by == "random":
        generator = torch.Generator().manual_seed(reuse.seed * 1_000_003 + i)
        return [float(number) for number in torch.rand(len(entering), generator=generator)]
    found = []
    for n, (token, value) in enumerate(zip(entering, held, strict=True)):
        if reuse.by == "value":
            found.append(sum(1 - math.sqrt(sum(float(x) ** 2 for x in head[n])) for head in values))
        elif reuse.by == "norm":
            found.append(math.sqrt(sum(float(x) ** 2 for x in token)))
        else:
            along = sum(float(x) * float(y) for x, y in zip(token, value, strict=True))
            found.append(1 - along / float(token.norm()) / float(value.norm()))
    length = math.sqrt(sum(number**2 for number in found))
    return [number / length for number in found]


class Rows:
    """What the MLPs' hooks do: remember outputs and ages, and on reused steps write over all but the chosen rows."""

    def __init__(self, reuse: Tokens, n: int, head: int) -> None:
        self.reuse, self.n, self.head, self.i = reuse, n, head, 0
        self.held: dict[str, Tensor] = {}
        self.ages: dict[str, list[list[int]]] = {}
        self.values: dict[str, tuple[Tensor, ...]] = {}
        self.held_attention = True

    def makes(self, path: str, module: nn.Module, args: Any, result: Tensor) -> None:
        """Value vectors, which attention makes in this loop on every step, and in the library where it isn't held."""
        if self.i % self.n == 0 or not self.held_attention:
            self.values[path] = torch.split(result.clone(), self.head, dim=-1)

    def leaves(self, path: str, module: nn.Module, args: Any, result: Tensor) -> Tensor:
        if self.i % self.n == 0:
            self.held[path] = result.clone()
            self.ages[path] = [[0] * result.shape[1] for _ in result]
            return result
        held, aggressive = self.held[path].clone(), self.reuse.alternate and self.i % self.n % 2 == 1
        for b in range(len(result)):
            ages, chosen = self.ages[path][b], []
            if not aggressive:
                number = scores(self.reuse, args[0][b], self.held[path][b], self.i, [head[b] for head in self.values[path]])
                number = [s + self.reuse.age * a / self.reuse.period for s, a in zip(number, ages, strict=True)]
                ranked = sorted(range(len(number)), key=lambda token: -number[token])
                chosen = ranked[: max(1, int(self.reuse.share * len(number)))]
            for token in chosen:
                held[b, token] = result[b, token]
            self.ages[path][b] = [0 if token in chosen else age + 1 for token, age in enumerate(ages)]
        self.held[path] = held
        return held.clone()


def loop(case: Case, reuse: Tokens, n: int, times: Sequence[float] = TIMES, *, only_mlps: bool = False) -> list[Tensor]:
    """One generation in double precision; attention is held by ``naive_modules.run``'s hooks, unless only MLPs are."""
    model, rows = case.build().double(), Rows(reuse, n, HEADS.get(case.name, HEAD))
    rows.held_attention = not only_mlps
    held = Held("mlp", period(n))
    for path in paths(case, model, held):
        hook = lambda module, args, result, path=path: rows.leaves(path, module, args, result)  # noqa: E731
        model.get_submodule(path).register_forward_hook(hook)
        block, _, name = path.rpartition(".")
        model.get_submodule(f"{block}.{VALUES[case.name][name]}").register_forward_hook(functools.partial(rows.makes, path))
    model.register_forward_hook(lambda module, args, result: setattr(rows, "i", rows.i + 1))
    kinds = [] if only_mlps else [kind for kind in NAMES[case.name] if kind != "mlp"]
    return run(case, model, times, [Held(kind, period(n)) for kind in kinds])


@pytest.mark.parametrize("case", (DIT, PIXART, LATTE, FLUX, WAN), ids=str)
@pytest.mark.parametrize("alternate", (False, True), ids=("toca", "duca"))
@pytest.mark.parametrize("by", ("norm", "similarity", "random"))
def test_toca_and_duca(case: Case, alternate: bool, by: Any) -> None:
    """In double precision, since a product of some rows may round otherwise than the same rows of all: see ``close``."""
    n, maker = (4, duca) if alternate else (3, toca)
    preset = maker(n, 0.3, by=by)
    if case is FLUX and by == "similarity":
        with pytest.raises(ConfigError, match="takes width 32 and returns 128"):
            ours(case, preset, TIMES)
        return
    expected = loop(case, Tokens(0.3, by=by, period=n, alternate=alternate), n)
    found, model = ours(case, preset, TIMES, torch.float64)
    close(found, expected)
    assert not model.cachekit.stats.notes
    holding = ours(case, every(n), TIMES, torch.float64, segments="modules")[0]
    assert not all(torch.allclose(a, b) for a, b in zip(found, holding, strict=True))


def test_spec_strings() -> None:
    for spec, preset in (("toca-3-0.07", toca(3, 0.07)), ("duca-3-0.05", duca(3, 0.05)), ("fastercache-3-0", fastercache(3, 0))):
        assert cachekit.spec.parse_policy(spec) == preset
    assert cachekit.reuse.parse_reuse("tokens-0.07") == Tokens(0.07)
    with pytest.raises(ConfigError, match="no beta"):
        cachekit.reuse.parse_reuse("residual-tokens-0.07")


@pytest.mark.parametrize("case", (DIT, PIXART, FLUX), ids=str)
def test_all_tokens_of_mlps_are_a_recompute(case: Case) -> None:
    """Bit for bit: ToCa's on every step, DuCa's on every step that is not aggressive."""
    plain = generate(case.build(), case, TIMES)
    found, model = ours(case, toca(3, 1.0), TIMES, segments="mlp")
    assert_equal(found, plain)
    assert model.cachekit.stats.modules_run < model.cachekit.stats.modules_total
    expected = run(case, case.build(), TIMES, [Held("mlp", lambda i, t: i % 4 not in (1, 3))])
    assert_equal(ours(case, duca(4, 1.0), TIMES, segments="mlp")[0], expected)


@settings(max_examples=20)
@given(st.integers(1, 12), st.floats(0.01, 1.0), st.sampled_from(BY), st.integers(0, 5))
def test_chosen_tokens(tokens: int, share: float, by: Any, seed: int) -> None:
    """So many of them, without repeats, in rising order; the oldest first where nothing else tells them apart."""
    entering, held = (torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(seed + k)) for k in range(2))
    ages = torch.randint(0, 9, (2, tokens), dtype=torch.int16, generator=torch.Generator().manual_seed(seed))
    step, measured = Step(3, 500.0), held[:, :, 0]
    chosen = Tokens(share, by=by).choose(entering, held, ages, step, 1, measured)
    assert chosen is not None
    assert chosen.shape == (2, max(1, int(share * tokens)))
    assert all(row == sorted(set(row)) for row in chosen.tolist())
    oldest = Tokens(share, by=by, age=1e6).choose(entering, held, ages, step, 1, measured)
    assert oldest is not None
    for row, age in zip(oldest.tolist(), ages.tolist(), strict=True):
        left = [age[token] for token in range(tokens) if token not in row]
        assert min(age[token] for token in row) >= max(left, default=0)


def test_random_tokens_leave_the_generators_alone() -> None:
    """And are the same in a second generation, for every sample of a batch."""
    model = cachekit.wrap(usual(), duca(2, 0.4), segments="mlp")
    model = cachekit.wrap(model, toca(2, 0.4, by="random"))
    state = torch.get_rng_state()
    found = sample(model)
    assert torch.get_rng_state().equal(state)
    assert_equal(sample(model), found)
    x = torch.randn(3, 8, 4)
    chosen = Tokens(0.5, by="random").choose(x, x, torch.zeros(3, 8, dtype=torch.int16), Step(2, 1.0), 1)
    assert chosen is not None and chosen[0].equal(chosen[2])


class Averaging(Gated):
    """An MLP that mixes tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.mean(dim=1, keepdim=True))


class Strict(Gated):
    """An MLP that insists on a number of tokens by returning another."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found if x.shape[1] == 5 else found[:, :1]


@pytest.mark.parametrize("mlp", (Averaging, Strict))
def test_what_mixes_tokens_is_held(mlp: Any) -> None:
    """Nothing that some tokens alone would not have given is written over; a note says so."""
    model: Any = cachekit.wrap(toy(mlp=mlp), every(2), segments="mlp", reuse=HALF)
    assert_equal(sample(model), sample(cachekit.wrap(toy(mlp=mlp), every(2), segments="mlp")))
    assert any("tokens are recomputed in MLPs alone" in note for note in model.cachekit.stats.notes)


@pytest.mark.parametrize("segments", ("attn", "middle", Segment(0, 1, modules="cross_attn")), ids=str)
def test_where_there_are_no_mlps_values_are_held(segments: Any) -> None:
    model: Any = cachekit.wrap(usual(), every(2), segments=segments, reuse=HALF)
    assert_equal(sample(model), sample(cachekit.wrap(usual(), every(2), segments=segments)))
    assert any("tokens are recomputed in MLPs alone" in note for note in model.cachekit.stats.notes)


@pytest.mark.parametrize("case", (DIT, FLUX, LATTE), ids=str)
def test_bytes_are_known_beforehand(case: Case) -> None:
    """The ages too."""
    model = case.build()
    graph = cachekit.graph(model, **case.inputs(900.0))
    expected = graph.nbytes("modules", HALF)
    assert expected > graph.nbytes("modules", "output")
    model = ours(case, every(2), TIMES[:3], segments="modules", reuse=HALF)[1]
    assert model.cachekit.stats.bytes_peak == expected


def test_inference_mode_and_recompute_reset_what_was_refreshed() -> None:
    with torch.inference_mode():
        found = sample(cachekit.wrap(usual(), toca(3, 0.5)))
    assert_equal(found, sample(cachekit.wrap(usual(), toca(3, 0.5))))
    model: Any = cachekit.wrap(toy(mlp=Gated, attn=Mixer), toca(2, 0.5))
    sample(model)
    assert [sum(record.modules) for record in model.cachekit.stats.records] == [6, 0, 6, 0]


class Two(Tokens):
    """A reuse that names tokens and holds two values."""

    @property
    def length(self) -> int:
        return 2


def test_a_reuse_that_names_tokens_holds_one_output() -> None:
    with pytest.raises(ConfigError, match="length 1 and beta 0"):
        cachekit.wrap(usual(), every(2), segments="mlp", reuse=Two(0.5))
    with pytest.raises(ConfigError, match="the whole prediction has no tokens"):
        cachekit.wrap(usual(), toca(3), segments="model")


@pytest.mark.parametrize("case", (DIT, LATTE, FLUX), ids=str)
@pytest.mark.parametrize("known", (True, False))
def test_fastercaches_attention(case: Case, known: bool) -> None:
    """F₀ + w (F₀ - F₁) of computed values; w by the step where their number is known, else by t. One subtraction and weighted
    sum, here of the same terms: equal to rounding, see ``close``."""

    def mixed(values: list[tuple[float, Tensor]], now: float) -> Tensor:
        w = now / (len(TIMES) - 1) if known else 1 - TIMES[int(now)] / 1000
        return values[0][1] + w * (values[0][1] - values[1][1])

    def full(i: int, t: float) -> bool:
        return i % 2 == 0 or t >= 681

    expected = run(case, case.build().double(), TIMES, [Held("attn", full, formula=mixed)])
    model = cachekit.wrap(case.build().double(), "fastercache-2-0")
    shape = Shape(dtype=torch.float64)
    found = ours(case, "fastercache-2-0", TIMES, torch.float64)[0] if known else generate(model, case, TIMES, shape=shape)
    close(found, expected)
    assert not found[-1].allclose(ours(case, "fastercache-2-0", TIMES, torch.float64, reuse=Forecast())[0][-1])


def test_a_mix_holds_where_nothing_tells_how_far_it_is() -> None:
    """And where there is one value only."""
    mix = Mix()
    times = [mix.time(Step(i, 900.0 - i, node=i)) for i in range(3)]
    assert len(set(times)) == 3
    assert mix.weights([times[1], times[0]], times[2]) == [1.0]
    assert mix.weights([0.2], 0.4) == [1.0]
    assert Mix(0.0, 0.5).weights([0.2, 0.1], 0.4) == [1.2, -0.2]
    assert Mix().weights([0.9, 0.8], Mix().time(Step(0, -5.0, range=1000.0))) == [2.0, -1.0]
