"""Modules as sites: what is verified and dropped, refused, counted, copied, compiled, and left behind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import Case
from running import TIMES, generate
from torch import Tensor, nn
from toys import CONTEXT, Block, Gated, Mixer, inputs, sample, toy, usual
from wrapping import identical, snapshot
from zoo import DIT, FLUX, HUNYUAN_DIT, LATTE, PIXART

import cachekit
from cachekit import ConfigError, Forecast, Segment
from cachekit.policies import accumulated, every, first


def wrapped(model: nn.Module | None = None, policy: Any = "every-2", **options: Any) -> Any:
    """A wrapped toy."""
    return cachekit.wrap(usual() if model is None else model, policy, **{"segments": "modules", **options})


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "segments",
    (
        "modules",
        "attn",
        "blocks",
        "stack",
        "model",
        "skip-2",
        [Segment(0, 2, modules="mlp"), Segment(2, None, modules=("mlp", "attn"), reuse="output")],
        [(0, 1), Segment(1, None, modules="attn", reuse=Forecast(3))],
        Segment(1, None, each=True),
    ),
    ids=str,
)
@pytest.mark.parametrize("case", (DIT, HUNYUAN_DIT, FLUX, LATTE, PIXART), ids=str)
def test_bytes_are_known_beforehand(case: Case, segments: Any) -> None:
    """For each branch, once the histories are full."""
    model = case.build()
    expected = cachekit.graph(model, **case.inputs(900.0)).nbytes(segments, "taylor-1")
    cachekit.wrap(model, "every-1", segments=segments, reuse="taylor-1")
    with torch.no_grad():
        generate(model, case, TIMES)
    stats = model.cachekit.stats
    assert expected > 0
    assert stats.bytes_held == stats.bytes_peak == expected


def test_bytes_of_a_choice_that_can_not_be_wrapped() -> None:
    x, memory = inputs()
    graph = cachekit.graph(usual(), x, torch.tensor(5.0), memory)
    with pytest.raises(ConfigError, match="share block"):
        graph.nbytes([(0, 2), Segment(modules="attn")])
    assert graph.nbytes("modules", "output") == 3 * 3 * x.numel() * 4


@pytest.mark.parametrize(
    ("segments", "says"),
    (
        ([(0, 2), Segment(1, None, modules="attn")], "where it is reused its modules are not called"),
        ([Segment(0, 2, modules="attn"), Segment(1, None, modules=("mlp", "attn"))], "share module attn of block blocks.1"),
        (Segment(modules="attention"), "write one of 'attn', 'cross_attn', 'mlp', 'spatial_attn', 'temporal_attn'"),
        (Segment(modules=()), "write one of 'attn'"),
        (Segment("model", modules="attn"), "start and stop are block numbers"),
        (Segment("model", each=True), "start and stop are block numbers"),
        (Segment(0, 9, modules="attn"), "lies outside this stack of 3 blocks"),
    ),
)
def test_refused(segments: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sample(wrapped(segments=segments))


def test_each_block_keeps_a_state_of_its_own() -> None:
    """One policy object, which counts for each block; the decisions of ranges with other policies are theirs."""
    segments = [Segment(0, 1, each=True, policy="at-most-1"), Segment(1, None, each=True, policy="at-most-2")]
    model = wrapped(segments=segments)
    sample(model, tuple(float(t) for t in range(900, 0, -100)))
    ran = [record.recomputed for record in model.cachekit.stats.records]
    assert [row[0] for row in ran] == [i % 2 == 0 for i in range(9)]
    assert all(row[1] == row[2] == (i % 3 == 0) for i, row in enumerate(ran))


def test_a_probe_before_modules() -> None:
    """A threshold on the first block decides on the modules of the others."""
    model = wrapped(policy="change-0.0", segments=Segment(1, None, modules=("attn", "mlp")))
    sample(model)
    assert model.cachekit.stats.modules_run == model.cachekit.stats.modules_total
    model = wrapped(policy="change-9", segments=Segment(1, None, modules=("attn", "mlp")))
    sample(model)
    # The first block's three and the two others' cross-attention run on every step.
    assert [sum(record.modules) for record in model.cachekit.stats.records] == [9, 5, 5, 5]
    with pytest.raises(ConfigError, match="the block before the segment"):
        sample(wrapped(policy="change-0.1", segments="attn"))


def test_a_look_into_a_block_is_no_call_of_its_modules() -> None:
    """What runs before the block's attention when it is looked into: the decision is the first block's modulated input's."""
    model = wrapped(toy(mlp=Gated, attn=Mixer), accumulated(9.0, signal="modulated", coefficients=(1.0, 0.0)))
    sample(model)
    assert [sum(record.modules) for record in model.cachekit.stats.records] == [6, 0, 0, 0]
    assert not model.cachekit.stats.dropped
    model = wrapped(toy(mlp=Gated, attn=Mixer), accumulated(0.0, signal="modulated", coefficients=(1.0, 0.0)))
    assert equal(sample(model), sample(toy(mlp=Gated, attn=Mixer)))


def test_another_sequence_of_modules_recomputes() -> None:
    """A module that is left out from some step on: what was stored is dropped, the step is full, and reuse goes on."""
    model, plain, found, expected = wrapped(), usual(), [], []
    x, memory = inputs()
    with torch.no_grad(), model.cachekit.session():
        for i, t in enumerate((900.0, 800.0, 700.0, 600.0)):
            for each in (model, plain):
                block = each.blocks[1]
                assert isinstance(block, Block)
                block.skips = {"cross_attn"} if i >= 1 else set()
            found.append(model(x, torch.tensor(t), memory))
            expected.append(plain(x, torch.tensor(t), memory))
    assert model.cachekit.stats.dropped == {"another sequence of modules": 1}
    assert equal(found[:2], expected[:2])
    assert [sum(record.modules) for record in model.cachekit.stats.records] == [9, 8, 8, 0]


class Growing(Mixer):
    """Attention that returns more tokens from some call on."""

    tokens = 0

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        found = super().forward(x, memory, mask)
        return torch.cat([found, found[:, : self.tokens]], dim=1)


class Cut(Block):
    """A block that takes what it needs of what its attention returns."""

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return x + self.get_submodule("attn")(self.norm(x))[:, : x.shape[1]]  # type: ignore[no-any-return]


def test_another_output_recomputes() -> None:
    torch.manual_seed(0)
    attention = Growing()
    model = wrapped(toy(1, attn=Mixer), segments="attn", reuse="taylor-1")
    model.blocks[0] = Cut(attn=attention)
    x, memory = inputs()
    with torch.no_grad(), model.cachekit.session():
        for t in (900.0, 800.0, 700.0):
            attention.tokens = 2 if t == 700.0 else 0
            model(x, torch.tensor(t), memory)
    assert model.cachekit.stats.dropped == {"a module that returns something else": 1}


def test_another_context_recomputes() -> None:
    """A prompt of another length shows in the cross-attention alone."""
    model = wrapped(segments="cross_attn")
    x, memory = inputs()
    longer = inputs(memory=7)[1]
    with torch.no_grad(), model.cachekit.session(), model.cachekit.branch("named"):
        for t, given in ((900.0, memory), (800.0, longer)):
            found = model(x, torch.tensor(t), given)
    with torch.no_grad():
        assert found.equal(usual()(x, torch.tensor(800.0), longer))
    assert model.cachekit.stats.modules_run == model.cachekit.stats.modules_total


class Writing(Gated):
    """An MLP that writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


@pytest.mark.parametrize("inference", (False, True))
def test_what_writes_into_its_input_always_runs(inference: bool) -> None:
    model, plain = wrapped(toy(mlp=Writing)), toy(mlp=Writing)
    with torch.inference_mode(inference):
        assert equal(sample(model), sample(plain))
    stats = model.cachekit.stats
    assert stats.modules_run == stats.modules_total == 12
    assert any("module mlp of Block writes into what it takes" in note for note in stats.notes)


def test_what_is_returned_is_the_models_own() -> None:
    """A model may write into it: the stored value stays."""

    class Overwriting(Block):
        def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
            return x + self.get_submodule("mlp")(self.norm(x)).mul_(3.0)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = wrapped(toy(1, mlp=Gated), first(1))
    model.blocks[0] = Overwriting(mlp=Gated())
    x, memory = inputs()
    with torch.no_grad(), model.cachekit.session(), model.cachekit.branch("only"):
        found = [model(x, torch.tensor(0.0 + t), memory) for t in (3, 3, 3)]
    assert model.cachekit.stats.modules_run == 1
    assert equal(found[:2], found[1:])


def test_copies_and_removal() -> None:
    """Copies are wrapped models with modules and statistics of their own; nothing is left behind."""
    plain = sample(usual())
    model: Any = usual()
    before = snapshot(model)
    wrapped(model)
    ours = sample(model)
    assert not equal(ours, plain)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.cachekit.reset()
        assert equal(sample(twin), ours)
        assert twin.cachekit.stats.modules_run == 18
        assert equal(sample(cachekit.unwrap(twin)), plain)
    assert model.cachekit.stats.modules_run == 18
    cachekit.unwrap(model)
    assert identical(before, snapshot(model))
    assert equal(sample(model), plain)


def test_one_module_in_several_blocks() -> None:
    """Shared weights: each block's call is its own."""
    model: Any = usual()
    plain = usual()
    for each in (model, plain):
        for block in each.blocks:
            block.mlp = each.blocks[0].mlp
    wrapped(model, every(1))
    assert equal(sample(model), sample(plain))
    wrapped(model)
    sample(model)
    assert (model.cachekit.stats.modules_run, model.cachekit.stats.modules_total) == (18, 36)


def test_compiled_blocks_hide_their_modules() -> None:
    """They all run, and a note says what to write instead: compiled modules are reused."""
    model: Any = usual(2)
    plain = usual(2)
    for block in model.blocks:
        block.compile(backend="eager")
    wrapped(model)
    assert equal(sample(model), sample(plain))
    assert any("compile the modules" in note for note in model.cachekit.stats.notes)
    expected = sample(wrapped(usual(2)))
    model = usual(2)
    for block in model.blocks:
        for name in ("attn", "cross_attn", "mlp"):
            block.get_submodule(name).compile(backend="eager")
    wrapped(model)
    assert equal(sample(model), expected)
    assert (model.cachekit.stats.modules_run, model.cachekit.stats.modules_total) == (12, 24)
    assert not model.cachekit.stats.notes


def test_blocks_compiled_between_steps() -> None:
    model, plain = wrapped(usual(2)), usual(2)
    x, memory = inputs()
    with torch.no_grad(), model.cachekit.session():
        model(x, torch.tensor(900.0), memory)
        for block in model.blocks:
            block.compile(backend="eager")
        found = model(x, torch.tensor(800.0), memory)
        assert found.equal(plain(x, torch.tensor(800.0), memory))
    assert model.cachekit.stats.dropped == {"another sequence of blocks": 1}
    assert any("compile the modules" in note for note in model.cachekit.stats.notes)


def test_a_context_of_another_width_is_no_stream() -> None:
    """Residuals count from what has the output's shape, not from the context."""
    model = wrapped(toy(cross_attn=lambda: Mixer(CONTEXT)), first(1), reuse="residual")
    x, memory = inputs()
    with torch.no_grad(), model.cachekit.session():
        one, two = (model(x, torch.tensor(t), memory) for t in (0.2, 0.1))
    # Equal to rounding where nothing moved but t by 1e-4 of its share: a residual of something else is off by order 1.
    assert torch.allclose(one, two, atol=1e-2)
