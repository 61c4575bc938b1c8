"""What long skip connections refuse, and what they say then."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import original_zoo
import pytest
import torch
from adding import Mean, output
from torch import nn
from wrapping import identical, snapshot
from zoo import DIT, LATTE

import cachekit
from cachekit.fusions import Spectral


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.keywords):
        yield


def test_blocks_out_of_their_model_are_refused() -> None:
    model: Any = cachekit.add_long_skips(original_zoo.DIT.build())
    x, c = torch.randn(2, 16, 24), torch.randn(2, 24)
    model.blocks[0](x, c)
    with pytest.raises(cachekit.ModelError, match=r"'blocks.5'.*outside of a call of the model"):
        model.blocks[5](x, c)
    with pytest.raises(cachekit.ModelError, match="called directly"):
        model.blocks[5].forward(x, c)


def test_an_early_block_that_did_not_run_is_refused() -> None:
    model = cachekit.add_long_skips(LATTE.build())
    with pytest.raises(cachekit.ModelError, match=r"before block 'temporal_transformer_blocks.1' was called"):
        output(model, LATTE, conditioning={**LATTE.conditioning(), "enable_temporal_attentions": False})


class Adding(nn.Module):
    """A block that may add to its input in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.in_place = nn.LayerNorm(8), nn.Linear(8, 8), in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(self.norm(x))
        return x.add_(y) if self.in_place else x + y


class Stack(nn.Module):
    """Blocks, of which some write into their input."""

    def __init__(self, in_place: set[int]) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList([Adding(i in in_place) for i in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("inference", [False, True])
def test_a_long_skip_that_was_written_into_is_refused(inference: bool) -> None:
    """It would bring what a later block made of it. A write that no long skip sees changes nothing."""
    with torch.inference_mode(inference):
        x = torch.randn(2, 3, 8)
        for writing in range(1, 5):
            model = cachekit.add_long_skips(Stack({writing}), pairs=[(1, 4)])
            # Block 2 writes into what block 1 returned; the late one into its own fused stream.
            if writing == 2:
                with pytest.raises(cachekit.ModelError, match=r"'blocks.4' takes in what block 'blocks.1' returned, .*x = x"):
                    model(x)
                continue
            for _ in range(2):
                found = model(x)
            plain = Stack(set())
            plain.load_state_dict(model.state_dict(), strict=False)
            assert torch.equal(found, plain(x))


def test_mismatches_are_said_at_the_first_call() -> None:
    case = original_zoo.HUNYUAN_VIDEO
    with pytest.raises(cachekit.ModelError, match=r"2_to_4 brings .* give pairs="):
        output(cachekit.add_long_skips(case.build()), case)
    output(cachekit.add_long_skips(case.build(), pairs=[(0, 2), (3, 6)]), case)
    model = cachekit.add_long_skips(DIT.build(), width=8)
    with pytest.raises(cachekit.ModelError, match=r"width 8.*add_long_skips\(model, width=32\)"):
        output(model, DIT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "sum"}, r"fusion='sum'; write one of 'paper', 'residual', 'spectral'"),
        ({"fusion": Mean(3)}, "callable"),
        ({"fusion": lambda width: None}, "callable"),
        ({"pairs": []}, "at least one pair"),
        ({"pairs": [(0, 6)]}, "this stack of 6"),
        ({"pairs": [(3, 3)]}, "the early one comes first"),
        ({"pairs": [(0, 5), (1, 5)]}, "only one for each late block"),
        ({"pairs": 3}, r"list of \(early, late\)"),
        ({"pairs": [(0, 5.0)]}, r"list of \(early, late\)"),
        ({"seed": 1.5}, "a seed is a whole number"),
        ({"width": 0}, "whole number above 0"),
        ({"fusion": partial(Spectral, bound=0)}, "above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    model = DIT.build()
    before = snapshot(model)
    with pytest.raises(cachekit.ConfigError, match=message):
        cachekit.add_long_skips(model, **options)
    assert identical(before, snapshot(model))


def test_models_that_cannot_take_them_are_refused() -> None:
    with pytest.raises(cachekit.ModelError, match=r"no torch\.nn\.Module"):
        cachekit.add_long_skips(3)  # type: ignore[type-var]
    with pytest.raises(cachekit.ModelError, match="a stack of 0 blocks"):
        cachekit.add_long_skips(nn.Linear(2, 2))
    with pytest.raises(cachekit.ModelError, match="already"):
        cachekit.add_long_skips(cachekit.add_long_skips(DIT.build()))
    outer = nn.ModuleDict({"transformer": cachekit.wrap(DIT.build())})
    with pytest.raises(cachekit.ModelError, match="'transformer' is wrapped"):
        cachekit.add_long_skips(outer)
    taken = DIT.build()
    taken.long_skips = None
    with pytest.raises(cachekit.ModelError, match="attribute 'long_skips' of its own"):
        cachekit.add_long_skips(taken)
