"""Tokens chosen by their value vectors in self-attention, by a share that changes, and by squares of a grid."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_modules import Held, run
from running import assert_equal, generate
from test_modules import close, ours
from test_tokens import TIMES, loop
from torch import Tensor, nn
from toys import WIDTH, Gated, inputs, sample, toy
from zoo import DIT, FLUX, LATTE, PIXART, SD3, WAN

import cachekit
from cachekit import ConfigError, Step
from cachekit.policies import duca, every, toca
from cachekit.policies.reuses import Tokens
from cachekit.values import projections

VALUE = Tokens(0.4, by="value")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Separate(nn.Module):
    """Self-attention with a layer for each of queries, keys and values."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)  # type: ignore[no-any-return]


class Paired(nn.Module):
    """``Separate`` with one layer for keys and values."""

    def __init__(self, of: Separate) -> None:
        super().__init__()
        self.to_q, self.heads, self.to_kv = of.to_q, of.heads, nn.Linear(WIDTH, 2 * WIDTH)
        self.to_kv.weight.copy_(torch.cat([of.to_k.weight, of.to_v.weight]))
        self.to_kv.bias.copy_(torch.cat([of.to_k.bias, of.to_v.bias]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(x), *self.to_kv(x).chunk(2, -1)))
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)  # type: ignore[no-any-return]


class Writing(Separate):
    """One that doubles its value vectors where they lie."""

    def forward(self, x: Tensor) -> Tensor:
        v = self.to_v(x)
        # A copy of what they are goes on, so that both kinds return the same.
        found = (self.to_q(x) @ self.to_k(x).mT).softmax(-1) @ v.clone()
        v.mul_(-100)
        return found  # type: ignore[no-any-return]


class Renamed(Separate):
    """The layer of values has a name that nobody knows."""

    def __init__(self) -> None:
        super().__init__(1)
        self.content = self.to_v
        del self.to_v

    def forward(self, x: Tensor) -> Tensor:
        return (self.to_q(x) @ self.to_k(x).mT).softmax(-1) @ self.content(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("case", "alternate"),
    [(DIT, False), (DIT, True), (PIXART, True), (LATTE, False), (FLUX, False), (WAN, True)],
    ids=str,
)
def test_tokens_by_value(case: Case, alternate: bool) -> None:
    """In double precision, see ``close``. Two streams, and two layouts."""
    n, maker = (4, duca) if alternate else (3, toca)
    expected = loop(case, Tokens(0.3, by="value", period=n, alternate=alternate), n)
    found, model = ours(case, maker(n, 0.3, by="value"), TIMES, torch.float64)
    close(found, expected)
    assert not model.cachekit.stats.notes and not model.cachekit.stats.dropped
    for by in ("norm", "random"):
        other = ours(case, maker(n, 0.3, by=by), TIMES, torch.float64)[0]
        assert not all(torch.allclose(a, b) for a, b in zip(found, other, strict=True))


@pytest.mark.parametrize("case", (DIT, PIXART), ids=str)
def test_values_are_those_of_the_last_time_that_attention_ran(case: Case) -> None:
    """That is in the same step, where attention is held nowhere."""
    reuse = Tokens(0.3, by="value")
    found, _ = ours(case, every(3), TIMES, torch.float64, segments="mlp", reuse=reuse)
    close(found, loop(case, reuse, 3, only_mlps=True))


@pytest.mark.parametrize("case", (DIT, FLUX), ids=str)
def test_all_tokens_are_a_recompute(case: Case) -> None:
    """Bit for bit: ToCa's on every step, DuCa's on every step that is not aggressive."""
    assert_equal(ours(case, toca(3, 1.0, by="value"), TIMES, segments="mlp")[0], generate(case.build(), case, TIMES))
    expected = run(case, case.build(), TIMES, [Held("mlp", lambda i, t: i % 4 not in (1, 3))])
    assert_equal(ours(case, duca(4, 1.0, by="value"), TIMES, segments="mlp")[0], expected)


@pytest.mark.parametrize("case", (DIT, FLUX, LATTE), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bytes_are_known_beforehand(case: Case, dtype: torch.dtype) -> None:
    model, reuse = case.build().to(dtype), Tokens(0.5, by="value")
    graph = cachekit.graph(model, **case.inputs(900.0, dtype=dtype))
    expected = graph.nbytes("modules", reuse)
    tokens = sum(
        module.inputs[0][1][0][0] * module.inputs[0][1][0][1]
        for visit in graph.visits
        for module in visit.modules
        if module.kind == "mlp"
    )
    assert expected == graph.nbytes("modules", Tokens(0.5)) + 4 * tokens
    assert ours(case, every(2), TIMES[:3], dtype, segments="modules", reuse=reuse)[1].cachekit.stats.bytes_peak == expected


def test_value_vectors_are_measured_before_anything_writes_into_them() -> None:
    options: Any = {"segments": "modules", "reuse": VALUE}
    plain = cachekit.wrap(toy(attn=lambda: Separate(1), mlp=Gated), every(3), **options)
    writing = cachekit.wrap(toy(attn=lambda: Writing(1), mlp=Gated), every(3), **options)
    for a, b in zip(sample(plain), sample(writing), strict=True):
        # One has its head in an axis of its own; their products round otherwise, by some eps of terms of order 1.
        assert torch.allclose(a, b, rtol=0, atol=1e-4)


def test_queries_keys_and_values_of_one_layer() -> None:
    """In double precision, see ``close``: another layer makes the same vectors."""
    plain = ours(PIXART, toca(2, 0.3, by="value"), TIMES, torch.float64)[0]
    model: Any = cachekit.wrap(PIXART.build().double(), toca(2, 0.3, by="value"))
    model.fuse_qkv_projections()
    with model.cachekit.session(steps=len(TIMES)), model.cachekit.branch("only"):
        close(generate(model, PIXART, TIMES, shape=Shape(dtype=torch.float64)), plain)
    assert "attn1.to_qkv" in dict(model.transformer_blocks[0].named_modules())


def test_keys_and_values_of_one_layer() -> None:
    """The same weights in one layer, and its product of another size: off by some eps of terms of order 1."""
    plain, fused = (toy(attn=Separate, mlp=Gated) for _ in range(2))
    for block in fused.blocks:
        attention: Any = block.attn
        block.attn = Paired(attention)
    found, expected = (sample(cachekit.wrap(model, every(3), segments="modules", reuse=VALUE)) for model in (fused, plain))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(found, expected, strict=True))
    other = sample(cachekit.wrap(plain, every(3), segments="modules", reuse=Tokens(0.4)))
    assert not all(torch.allclose(a, b, rtol=0, atol=1e-3) for a, b in zip(other, expected, strict=True))


def test_attention_that_stops_showing_its_values_starts_anew() -> None:
    """A full step whose layers are others drops what is stored, and finds them; one without any such layer is refused."""
    model: Any = cachekit.wrap(toy(attn=Separate, mlp=Gated), every(2), segments="modules", reuse=VALUE)
    x, memory = inputs()
    for t in (900.0, 800.0, 700.0, 600.0):
        if t == 700.0:
            for block in model.blocks:
                block.attn.to_v = copy.deepcopy(block.attn.to_q)
                block.attn.to_v.__dict__.pop("forward", None)
        x = x + 0.05 * model(x, torch.tensor(t), memory)
    stats = model.cachekit.stats
    assert dict(stats.dropped) == {"other value vectors in attention": 1}
    assert [any(record.modules) for record in stats.records] == [True, False, True, False]
    for block in model.blocks:
        block.attn.to_v = nn.Sequential(copy.deepcopy(block.attn.to_q))
    with pytest.raises(ConfigError, match="there were seen none"):
        model(x, torch.tensor(500.0), memory)


@pytest.mark.parametrize("attention", (Renamed, lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True)))
def test_values_that_are_not_seen_are_refused(attention: Any) -> None:
    model = cachekit.wrap(toy(attn=attention, mlp=Gated), every(2), segments="mlp", reuse=VALUE)
    with pytest.raises(ConfigError, match=r"module 'mlp' of block 'blocks.0' .*seen none .*Adapter\(values="):
        sample(model)


def test_an_adapter_names_the_layer() -> None:
    adapter = cachekit.Adapter(values=("content",))
    found = cachekit.wrap(toy(attn=Renamed, mlp=Gated), every(3), segments="modules", reuse=VALUE, adapter=adapter)
    usual_name = cachekit.wrap(toy(attn=lambda: Writing(1), mlp=Gated), every(3), segments="modules", reuse=VALUE)
    assert_equal(sample(found), sample(usual_name))


def test_two_attentions_over_the_same_tokens_are_refused() -> None:
    """Nothing tells whose vectors are meant; in blocks of one attention they are clear."""
    with pytest.raises(ConfigError, match=r"module 'ff' of block 'transformer_blocks.0' .*where one of that shape is needed"):
        ours(SD3, toca(3, by="value"), TIMES)
    segment = cachekit.Segment(2, None, modules=("attn", "mlp"))
    assert ours(SD3, every(3), TIMES, segments=segment, reuse=VALUE)[1].cachekit.stats.modules_run


def test_compiled_attention_hides_its_values() -> None:
    model: Any = toy(depth=1, attn=Separate, mlp=Gated)
    model.blocks[0].attn.compile(backend="eager")
    with pytest.raises(ConfigError, match="code compiled with its attention hides it"):
        sample(cachekit.wrap(model, every(2), segments="modules", reuse=VALUE))


def test_what_needs_no_values_looks_at_none() -> None:
    """No interceptor lies on the layers; and those of a choice by value go, are copied and pickled with the model."""
    plain, model = toy(attn=Separate, mlp=Gated), toy(attn=Separate, mlp=Gated)
    cachekit.wrap(model, every(2), segments="modules", reuse=Tokens(0.5))
    assert all("forward" not in block.attn.to_v.__dict__ for block in model.blocks)  # type: ignore[union-attr]
    cachekit.wrap(model, every(2), segments="modules", reuse=VALUE)
    found = sample(model)
    assert_equal(sample(copy.deepcopy(model)), found)
    assert_equal(sample(pickle.loads(pickle.dumps(model))), found)
    cachekit.unwrap(model)
    assert all("forward" not in block.attn.to_v.__dict__ for block in model.blocks)  # type: ignore[union-attr]
    assert_equal(sample(model), sample(plain))


def test_audits_measure_nothing() -> None:
    """A full pass in the shadow of a reused step leaves what is stored of value vectors as it was."""
    plain = ours(DIT, toca(3, 0.3, by="value"), TIMES)[0]
    found, model = ours(DIT, toca(3, 0.3, by="value"), TIMES, audit_every=1)
    assert_equal(found, plain)
    assert len(model.cachekit.stats.audits) > 0


class Wrong(Tokens):
    """Makes one number of all tokens."""

    def measure(self, values: Tensor) -> Tensor:
        return values.mean()


def test_a_measure_is_a_number_for_each_token() -> None:
    model = cachekit.wrap(toy(attn=Separate, mlp=Gated), every(2), segments="mlp", reuse=Wrong(0.5, by="value"))
    with pytest.raises(ConfigError, match=r"return a number for each token, \(batch, tokens\)"):
        sample(model)
    x = torch.randn(2, 4, 3)
    with pytest.raises(ConfigError, match="handed to choose"):
        VALUE.choose(x, x, torch.zeros(2, 4, dtype=torch.int16), Step(1, 500.0), 1)


def test_heads_and_layouts_of_projections() -> None:
    """Keys and values may have fewer heads; a layer whose layout is unknown is left alone."""
    grouped = Separate(4)
    grouped.to_v = nn.Linear(WIDTH, 4)
    (_, found), *none = projections(grouped, ("to_v", "qkv"))
    x = torch.randn(2, 3, 4)
    values = found.values(x)
    assert not none and values is not None and values.equal(x.reshape(2, 3, 2, 2))
    assert found.values(x[0]) is None and found.values((x,)) is None
    del grouped.to_q
    (_, unknown), *_ = projections(grouped, ("to_v",))
    assert unknown.head is None and unknown.values(x).shape == (2, 3, 1, 4)  # type: ignore[union-attr]
    fused = nn.Module()
    fused.num_heads = 2  # type: ignore[assignment]
    fused.qkv = nn.Linear(8, 24)
    (_, three), *_ = projections(fused, ("qkv",))
    y = torch.randn(2, 3, 24)
    assert three.values(y).equal(y[..., 16:].reshape(2, 3, 2, 4))  # type: ignore[union-attr]
    fused.qkv = nn.Linear(8, 16)
    assert not list(projections(fused, ("qkv",)))
    fused.kv = nn.Linear(8, 16)
    (_, two), *_ = projections(fused, ("qkv", "kv"))
    z = torch.randn(2, 3, 16)
    assert two.values(z).equal(z[..., 8:].reshape(2, 3, 2, 4))  # type: ignore[union-attr]


def raised(score: list[float], rows: int, columns: int, k: int, bonus: float) -> list[float]:
    """Of one sample's tokens the highest of each square, raised; the first of equal ones."""
    score = list(score)
    for frame in range(len(score) // (rows * columns)):
        for top in range(0, rows, k):
            for left in range(0, columns, k):
                places = [frame * rows * columns + (top + down) * columns + left + right for down in range(k) for right in range(k)]
                best = max(places, key=lambda place: score[place])
                score[best] += bonus * abs(score[best])
    return score


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.floats(0, 2), st.floats(0.05, 1))
def test_squares_of_a_grid(frames: int, high: int, wide: int, k: int, bonus: float, share: float) -> None:
    rows, columns = high * k, wide * k
    generator = torch.Generator().manual_seed(rows * 7 + columns)
    measured = torch.randn(2, frames * rows * columns, generator=generator, dtype=torch.float64)
    x = measured[..., None]
    reuse = Tokens(share, by="value", grid=(rows, columns), window=k, bonus=bonus, age=0)
    chosen = reuse.choose(x, x, torch.zeros(measured.shape, dtype=torch.int16), Step(1, 500.0), 1, measured)
    assert chosen is not None
    for row, numbers in zip(chosen.tolist(), measured.tolist(), strict=True):
        score = raised(numbers, rows, columns, k, bonus)
        best = sorted(range(len(score)), key=lambda token: -score[token])[: max(1, int(share * len(score)))]
        assert row == sorted(best)


def test_grids_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"window=2 divides no grid=\(4, 3\)"):
        Tokens(0.1, grid=(4, 3))
    with pytest.raises(ConfigError, match="16 tokens, which are no whole number of such grids"):
        ours(DIT, toca(2, 0.5, grid=(4, 6)), TIMES)
    found = ours(DIT, toca(2, 0.3, grid=(4, 4)), TIMES)[0]
    without = ours(DIT, toca(2, 0.3), TIMES)[0]
    assert not all(torch.allclose(a, b) for a, b in zip(found, without, strict=True))


@pytest.mark.parametrize(
    ("slope", "step", "expected"),
    [
        # ToCa's code for DiT, its steps numbered from 49 to 0: .2 (1 + .4 - .8 * 49 / 50), and so on, of 100 tokens.
        (0.4, Step(0, 980.0, steps=50), 12),
        (0.4, Step(24, 500.0, steps=50), 20),
        (0.4, Step(49, 0.0, steps=50), 28),
        (-0.4, Step(49, 0.0, steps=50), 12),
        (-0.4, Step(9, 750.0, range=1000.0), 24),
        (0.4, Step(9, 0.0, range=1000.0), 28),
        (0.4, Step(9, 0.0), 20),
        (0.0, Step(9, 0.0, steps=50), 20),
    ],
)
def test_a_share_that_changes(slope: float, step: Step, expected: int) -> None:
    x = torch.randn(1, 100, 3, generator=torch.Generator().manual_seed(0))
    # A hundredth of a token more, so that none is lost to rounding.
    chosen = Tokens(0.2001, slope=slope).choose(x, x, torch.zeros(1, 100, dtype=torch.int16), step, 1)
    assert chosen is not None and chosen.shape == (1, expected)


def test_a_share_never_passes_one() -> None:
    x = torch.randn(1, 10, 3, generator=torch.Generator().manual_seed(0))
    chosen = Tokens(0.9, slope=1.0).choose(x, x, torch.zeros(1, 10, dtype=torch.int16), Step(9, 0.0, steps=10), 1)
    assert chosen is not None and chosen.tolist() == [list(range(10))]


def test_presets_hand_their_choice_on() -> None:
    for maker, alternate in ((toca, False), (duca, True)):
        expected = Tokens(0.2, by="value", period=4, alternate=alternate, slope=0.4, grid=(4, 4))
        assert maker(4, 0.2, by="value", slope=0.4, grid=(4, 4)).reuse == expected
