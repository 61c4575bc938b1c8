"""Which modules of a block are attention, cross-attention and MLP, for models that an adapter describes and for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case
from diffusers import CogView4Transformer2DModel
from naive_modules import NAMES, is_temporal
from original_zoo import HUNYUAN_VIDEO as ORIGINAL_HUNYUAN_VIDEO
from original_zoo import ORIGINALS
from published import COGVIEW4, FLUX2, MOCHI
from torch import nn
from toys import CONTEXT, WIDTH, Gated, JointAttention, Mixer, inputs, sample, toy, usual
from zoo import CASES, FLUX, HUNYUAN_VIDEO

import cachekit
from cachekit import Adapter, Graph
from cachekit.adapter import adapter_for

FACTS = ("attention", "cross_attention", "mlp")


def graph_of(case: Case, adapter: Adapter | None = None) -> Graph:
    """The graph of a small model."""
    return cachekit.graph(case.build(), **case.inputs(900.0), adapter=adapter)


def found(graph: Graph) -> list[dict[str, str | None]]:
    """Name and kind of each visit's modules."""
    return [{module.name: module.kind for module in visit.modules} for visit in graph.visits]


@pytest.mark.parametrize("case", (*CASES, *ORIGINALS), ids=str)
def test_of_described_models(case: Case) -> None:
    """As written down by hand; which of them are in blocks over time too."""
    model, graph = case.build(), graph_of(case)
    for visit in graph.visits:
        block = model.get_submodule(visit.block)
        expected = {
            name: kind for kind, names in NAMES[case.name].items() for name in names if getattr(block, name, None) is not None
        }
        seen = {module.name: module.kind for module in visit.modules}
        # One that stands there and is not called in this block is not seen.
        assert seen.items() <= expected.items()
        assert set(expected) - set(seen) <= {"attn2"}
        assert all(module.temporal == is_temporal(case, visit.block) for module in visit.modules)


@pytest.mark.parametrize("case", (*CASES, *ORIGINALS), ids=str)
def test_of_the_same_models_undescribed(case: Case) -> None:
    """By names, classes and shapes alone it comes to the same, but for a bare layer that an adapter calls an MLP."""
    known = adapter_for(case.build())
    given = {name: getattr(known, name) for name in known.model_fields_set if name not in FACTS}
    undescribed, described = found(graph_of(case, Adapter(**given))), found(graph_of(case))
    if case in (FLUX, HUNYUAN_VIDEO):
        described = [{name: kind for name, kind in visit.items() if name != "proj_mlp"} for visit in described]
    assert undescribed == described
    assert case is ORIGINAL_HUNYUAN_VIDEO or all(undescribed)


@pytest.mark.parametrize("case", (MOCHI, COGVIEW4, FLUX2), ids=str)
def test_of_models_that_no_adapter_describes(case: Case) -> None:
    kinds = found(graph_of(case))
    assert all("attn" in visit.values() for visit in kinds)
    assert not any("cross_attn" in visit.values() for visit in kinds)
    assert "mlp" in kinds[0].values()
    assert CogView4Transformer2DModel.__name__ == COGVIEW4.name


def multihead() -> nn.MultiheadAttention:
    """torch's own, in the layout of the toys."""
    return nn.MultiheadAttention(WIDTH, 2, batch_first=True)


@pytest.mark.parametrize(
    ("modules", "expected"),
    (
        (
            {"attn": Mixer, "cross_attn": lambda: Mixer(CONTEXT), "mlp": Gated},
            {"attn": "attn", "cross_attn": "cross_attn", "mlp": "mlp"},
        ),
        ({"attn2": Mixer, "attn": lambda: Mixer(CONTEXT)}, {"attn2": "attn", "attn": "cross_attn"}),
        ({"self_attention": Mixer, "feed": Gated}, {"self_attention": "attn", "feed": "mlp"}),
        ({"joint": JointAttention, "feed": Gated}, {"joint": "attn", "feed": "mlp"}),
        ({"multi": multihead, "channel": Gated}, {"multi": "attn", "channel": "mlp"}),
        # Nothing tells a mixer that goes by another name from an MLP whose layers are in any order; it stands in for itself.
        ({"mixer": Mixer}, {"mixer": "mlp"}),
    ),
)
def test_of_toys(modules: Any, expected: dict[str, str]) -> None:
    """Layers of a modulation are no MLP."""
    x, memory = inputs()
    graph = cachekit.graph(toy(**modules), x, torch.tensor(5.0), memory)
    assert found(graph) == [expected] * 3


def test_an_adapter_has_the_last_word() -> None:
    """Names that it gives are taken, and no others are looked for; none at all is an answer too."""
    adapter = Adapter(attention=(), cross_attention=("attn",), mlp=())
    model: Any = cachekit.wrap(usual(), "every-2", segments="modules", adapter=adapter)
    sample(model)
    assert model.cachekit.stats.modules_total == 4 * 3
    model = cachekit.wrap(usual(), "every-2", segments="attn", adapter=adapter)
    sample(model)
    assert model.cachekit.stats.modules_run == model.cachekit.stats.modules_total
    assert any("kind attn" in note for note in model.cachekit.stats.notes)
