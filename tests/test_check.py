"""``cachekit.check``: good models pass, and each fault that a model can have is found at the block that has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor, nn
from zoo import CASES, DIT, HUNYUAN_DIT, LATTE

import cachekit

every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Good(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y: Tensor = x + torch.tanh(self.inner(x) + c)
        return y


class Stack(nn.Module):
    """Four blocks, of which the third may be another one."""

    def __init__(self, other: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Good(), Good(), other or Good(), Good()])
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = torch.sin(t).reshape(-1, 1, 1)
        for block in self.blocks:
            x = block(x, c)
        y: Tensor = self.head(x)
        return y


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 8, generator=generator), torch.tensor([7.0, 7.0])


def failed(report: cachekit.Report) -> set[tuple[str, str]]:
    """(site, first words of the claim) of every finding that does not hold."""
    return {(finding.site, finding.claim.partition(":")[0]) for finding in report.findings if not finding.holds}


def sites(report: cachekit.Report) -> set[str]:
    return {site for site, _ in failed(report)}


@every_case
def test_real_models_pass(case: Case) -> None:
    model = case.build()
    report = cachekit.check(model, **case.inputs(500.0))
    assert report.ok, str(report)
    units = len(case.stack) // case.unit
    name = "block" if case.unit == 1 else "unit"
    assert {finding.site for finding in report.findings} == {"model", "all blocks", *(f"{name} {k}" for k in range(units))}


def test_what_a_good_model_is_told() -> None:
    report = cachekit.check(Stack(), *inputs())
    assert report.ok
    lines = str(report).splitlines()
    assert lines[-1] == f"{len(report.findings)} of {len(report.findings)} properties hold"
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert any(
        line.startswith("ok   block 2 ") and line.endswith("do not run on a reused step: 3 of 4 blocks ran") for line in lines
    )
    for claim in ("two uncached calls agree", "every(1) equals the uncached model", "unwrap restores every __dict__"):
        assert any(claim in line for line in lines)


class Random(Good):
    """Draws noise in evaluation mode too, as dropout does that is called by its function."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x, c), 0.3, training=True)


class Memory(Good):
    """Keeps a moving average over calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.mean: Tensor

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.mean(dim=(0, 1))
        return super().forward(x + self.mean, c)


class Counter(Good):
    """Behaves otherwise at its second call, and from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, c) * (1.0 + self.calls)


@pytest.mark.parametrize("fault", [Random, Memory, Counter])
def test_a_block_that_is_no_function_of_its_inputs(fault: Callable[[], nn.Module]) -> None:
    report = cachekit.check(Stack(fault()), *inputs())
    assert not report.ok
    assert ("model", "two uncached calls agree") in failed(report)
    assert _blamed(report) == {"block 2"}
    assert "FAIL" in str(report)


def _blamed(report: cachekit.Report) -> set[str]:
    """The blocks that the report says the fault lies in."""
    return {finding.site for finding in report.findings if not finding.holds and finding.claim.startswith("called twice")}


class Steps(Stack):
    """Chooses its blocks by how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        c = torch.sin(t).reshape(-1, 1, 1)
        for block in self.blocks if self.calls % 2 else list(self.blocks)[:-1]:
            x = block(x, c)
        return x


def test_a_model_that_changes_its_sequence_of_blocks() -> None:
    report = cachekit.check(Steps(), *inputs())
    assert not report.ok
    assert ("model", "two uncached calls agree") in failed(report)


class Peeking(Stack):
    """Uses what a block left on itself, which a block that does not run has not left."""

    class Leaves(Good):
        seen: Tensor | None = None

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            self.seen = x.mean()
            return super().forward(x, c)

    def __init__(self) -> None:
        super().__init__(self.Leaves())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = super().forward(x, t)
        block: Any = self.blocks[2]
        seen, block.seen = block.seen, None
        return y if seen is None else y + seen


def test_a_model_that_reads_what_a_block_leaves_behind() -> None:
    report = cachekit.check(Peeking(), *inputs())
    found = failed(report)
    assert ("block 2", "output") in found
    assert ("all blocks", "output") in found
    # The others run it, and the whole prediction needs none.
    assert {site for site, _ in found} == {"all blocks", "block 2"}


class Writing(Stack):
    """Writes into its blocks' results after the call, as models do with what they need no more."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c, x = torch.sin(t).reshape(-1, 1, 1), x * 2
        results = []
        for block in self.blocks:
            x = block(x, c)
            results.append(x)
        y: Tensor = self.head(x)
        for result in results:
            result.zero_()
        return y


class Scaling(Stack):
    """Writes into its own input."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5), t)


class InPlace(Good):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x.add_(torch.tanh(self.inner(x) + c))


class Litter(Good):
    """Keeps on itself what a caller may want to look at."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.last = x
        return super().forward(x, c)


@pytest.mark.parametrize(
    "make",
    [Writing, Scaling, lambda: Stack(InPlace()), lambda: Stack(Litter())],
    ids=["results", "input", "in place", "attributes"],
)
def test_what_is_unusual_but_no_fault(make: Callable[[], nn.Module]) -> None:
    sample, t = inputs()
    copy = sample.clone()
    report = cachekit.check(make(), sample, t)
    assert report.ok, str(report)
    assert torch.equal(sample, copy), "the arguments are left as they were"


def test_what_dropout_does_in_training_mode_is_not_the_models_fault() -> None:
    class Dropout(Good):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            y: Tensor = self.drop(super().forward(x, c))
            return y

    model = Stack(Dropout()).train()
    model.blocks[0].eval()
    report = cachekit.check(model, *inputs())
    assert report.ok, str(report)
    modes = [block.training for block in model.blocks]
    assert model.training and modes == [False, True, True, True], "modes are put back, each as it was"


def test_it_leaves_the_model_as_it_was() -> None:
    for case in (DIT, LATTE, HUNYUAN_DIT):
        model = case.build()
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        before = {name: list(module.__dict__.items()) for name, module in model.named_modules()}
        cachekit.check(model, **case.inputs(500.0))
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        for name, module in model.named_modules():
            assert list(module.__dict__) == [key for key, _ in before[name]]
            assert all(module.__dict__[key] is value for key, value in before[name])


def test_also_where_the_call_raises() -> None:
    model = Stack()
    model.head = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        cachekit.check(model, *inputs())
    assert "cachekit" not in model.__dict__
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model.training


def test_half_precision_passes_too() -> None:
    model = Stack().to(torch.bfloat16)
    sample, t = inputs()
    report = cachekit.check(model, sample.to(torch.bfloat16), t.to(torch.bfloat16))
    assert report.ok, str(report)


def test_a_wrapped_model_is_refused() -> None:
    model = cachekit.wrap(Stack())
    with pytest.raises(cachekit.ModelError, match=r"the model is wrapped; cachekit\.unwrap\(model\) first"):
        cachekit.check(model, *inputs())
    assert "cachekit" in model.__dict__


def test_what_is_no_module_or_has_no_blocks_is_refused() -> None:
    with pytest.raises(cachekit.ModelError, match="no block of Plain was called"):
        cachekit.check(Plain(), *inputs())
    with pytest.raises(cachekit.ModelError, match=r"no torch\.nn\.Module"):
        cachekit.check(object())  # type: ignore[arg-type]


class Plain(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * t.reshape(-1, 1, 1)
