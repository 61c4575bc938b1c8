"""Checkpoints that the paper's authors released (arXiv 2411.17616), against their topology written out."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import original_zoo
import pytest
import torch
from adding import output
from original_videos import swap
from running import TIMES, assert_equal, generate
from safetensors.torch import save_file
from skip_cache_loop import Loop, paper
from torch import Tensor, nn
from torch.nn import functional
from wrapping import identical, snapshot
from zoo import DIT, LATTE, deeper

import cachekit

State = dict[str, Tensor]
EVEN_LATTE = deeper(LATTE, 6)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def drawn(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator)


def released(base: State, width: int, fusions: int, seed: int = 3) -> State:
    """A whole checkpoint under the authors' names."""
    draw, state = drawn(seed), dict(base)
    for k in range(fusions):
        state[f"skip_norms.{k}.weight"], state[f"skip_norms.{k}.bias"] = 1 + 0.1 * draw(2 * width), 0.1 * draw(2 * width)
        state[f"skip_linears.{k}.linear.weight"] = draw(width, 2 * width) / (2 * width) ** 0.5
        state[f"skip_linears.{k}.linear.bias"] = 0.1 * draw(width)
    return state


def fusion(state: State, k: int) -> State:
    """Fusion k of a checkpoint, as ``paper`` takes it."""
    return {
        "norm.weight": state[f"skip_norms.{k}.weight"],
        "norm.bias": state[f"skip_norms.{k}.bias"],
        "linear.weight": state[f"skip_linears.{k}.linear.weight"],
        "linear.bias": state[f"skip_linears.{k}.linear.bias"],
    }


class Units(nn.Module):
    """The original topology, written out: first-half outputs are kept in a list, from whose end the second half takes them."""

    def __init__(self, units: list[Callable[[Tensor], Tensor]], state: State) -> None:
        super().__init__()
        self.units, self.state = units, state

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        half = len(self.units) // 2
        for u, unit in enumerate(self.units):
            if u >= half:
                x = paper(fusion(self.state, u - half), x, skips.pop())
            x = unit(x)
            if u < half:
                skips.append(x)
        return x


def entering(module: nn.Module, call: Callable[[], Any]) -> Tensor:
    """What enters a module in a call."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    call()
    handle.remove()
    return seen[0]


def test_the_original_dit() -> None:
    case = original_zoo.DIT
    trained = case.build(seed=8)
    # The real one carries its position embedding, and may come out of DistributedDataParallel.
    state = released({**trained.state_dict(), "pos_embed": torch.zeros(1, 16, 24)}, 24, 3)
    inputs = case.inputs(500)
    c = trained.t_embedder(inputs["t"]) + trained.y_embedder(inputs["y"])
    expected = Units([functools.partial(block, c=c) for block in trained.blocks], state)(trained.x_embedder(inputs["x"]))
    for given in (state, {f"module.{key}": value for key, value in state.items()}):
        model = cachekit.load_long_skips(case.build(), given)
        assert torch.equal(entering(model.final_layer, functools.partial(model, **inputs)), expected)
        assert list(model.long_skips) == ["0_to_5", "1_to_4", "2_to_3"]


def test_the_original_latte() -> None:
    case = original_zoo.LATTE
    trained = case.build(seed=8)
    state = released(trained.state_dict(), 24, 2)
    inputs = case.inputs(500)
    batch, frames = inputs["x"].shape[:2]
    x = trained.x_embedder(inputs["x"].flatten(0, 1))
    c = trained.t_embedder(inputs["t"]) + trained.y_embedder(inputs["y"])
    spatial, temporal = c.repeat_interleave(frames, 0), c.repeat_interleave(x.shape[1], 0)

    def unit(i: int, x: Tensor) -> Tensor:
        x = swap(trained.blocks[i](x, spatial), batch)
        x = x + trained.temp_embed if i == 0 else x
        return swap(trained.blocks[i + 1](x, temporal), batch)

    expected = Units([functools.partial(unit, i) for i in range(0, 8, 2)], state)(x)
    model = cachekit.load_long_skips(case.build(), state)
    assert torch.equal(entering(model.final_layer, functools.partial(model, **inputs)), expected)


def test_the_original_latte_t2v() -> None:
    case = original_zoo.LATTE_T2V
    trained = case.build(seed=8)
    state = released({**trained.state_dict(), "caption_projection.y_embedding": torch.zeros(4, 12)}, 24, 2)
    inputs = case.inputs(500)
    batch, _, frames = inputs["hidden_states"].shape[:3]
    x = trained.pos_embed(inputs["hidden_states"].transpose(1, 2).flatten(0, 1))
    c = trained.adaln_single(inputs["timestep"])
    text = trained.caption_projection(inputs["encoder_hidden_states"]).repeat_interleave(frames, 0)
    spatial, temporal = c.repeat_interleave(frames, 0), c.repeat_interleave(x.shape[1], 0)
    model = case.build()

    def unit(i: int, x: Tensor) -> Tensor:
        x = swap(trained.transformer_blocks[i](x, None, text, None, spatial), batch)
        x = x + model.temp_pos_embed if i == 0 else x  # no part of a state dict
        return swap(trained.temporal_transformer_blocks[i](x, None, None, None, temporal), batch)

    expected = Units([functools.partial(unit, i) for i in range(4)], state)(x)
    cachekit.load_long_skips(model, state)
    assert torch.equal(entering(model.proj_out, functools.partial(model, **inputs)), expected)


WIDTH, HEADS = 32, 2


def original_dit(depth: int = 6) -> State:
    """Random weights under the names of the original DiT."""
    draw = drawn(8)
    sizes = {
        "x_embedder.proj": (WIDTH, 4, 2, 2),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
        "final_layer.linear": (32, WIDTH),
    }
    for i in range(depth):
        sizes[f"blocks.{i}.attn.qkv"], sizes[f"blocks.{i}.attn.proj"] = (3 * WIDTH, WIDTH), (WIDTH, WIDTH)
        sizes[f"blocks.{i}.mlp.fc1"], sizes[f"blocks.{i}.mlp.fc2"] = (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)
        sizes[f"blocks.{i}.adaLN_modulation.1"] = (6 * WIDTH, WIDTH)
    state = {}
    for name, size in sizes.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(*size) / size[1] ** 0.5, 0.2 * draw(size[0])
    state["y_embedder.embedding_table.weight"] = draw(1001, WIDTH)
    state["pos_embed"] = torch.zeros(1, 16, WIDTH)
    return state


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def normed(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def original_block(state: State, c: Tensor, i: int, x: Tensor) -> Tensor:
    """A block of the original DiT, written out."""
    name = f"blocks.{i}"
    modulation = linear(state, f"{name}.adaLN_modulation.1", functional.silu(c))
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
    qkv = linear(state, f"{name}.attn.qkv", normed(x, shift1, scale1))
    q, k, v = torch.unflatten(qkv, -1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + gate1[:, None] * linear(state, f"{name}.attn.proj", y)
    # diffusers builds this norm with another epsilon than the original.
    y = functional.gelu(linear(state, f"{name}.mlp.fc1", normed(x, shift2, scale2, 1e-5)), approximate="tanh")
    return x + gate2[:, None] * linear(state, f"{name}.mlp.fc2", y)


def test_diffusers_dit() -> None:
    """The original's weights and topology, written out from the original's names; embeddings as diffusers computes them."""
    state = released(original_dit(), WIDTH, 3)
    model = cachekit.load_long_skips(DIT.build(), state)
    inputs = DIT.inputs(500)
    emb = model.transformer_blocks[0].norm1.emb
    times = emb.time_proj(inputs["timestep"])
    c = linear(state, "t_embedder.mlp.2", functional.silu(linear(state, "t_embedder.mlp.0", times)))
    c = c + state["y_embedder.embedding_table.weight"][inputs["class_labels"]]
    patches = functional.conv2d(inputs["hidden_states"], state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=2)
    x = patches.flatten(2).transpose(1, 2) + model.pos_embed.pos_embed
    x = Units([functools.partial(original_block, state, c, i) for i in range(6)], state)(x)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", functional.silu(c)).chunk(2, dim=1)
    x = linear(state, "final_layer.linear", normed(x, shift, scale))
    expected = (
        torch.einsum("nhwpqc->nchpwq", torch.unflatten(torch.unflatten(x, 1, (4, 4)), -1, (2, 2, 8))).flatten(4, 5).flatten(2, 3)
    )
    torch.testing.assert_close(output(model, DIT), expected, rtol=1e-4, atol=1e-4)


def test_diffusers_latte() -> None:
    """The original text-to-video class and diffusers' have the same names, but for what only training uses."""
    case = EVEN_LATTE
    trained = case.build(seed=8)
    state = released({**trained.state_dict(), "caption_projection.y_embedding": torch.zeros(4, 16)}, 32, 3)
    model = cachekit.load_long_skips(case.build(), state)
    units = [case.stack[i : i + 2] for i in range(0, 12, 2)]
    loop = Loop(trained, units, None, {3 + k: fusion(state, k) for k in range(3)}, batch=2)
    inputs = case.inputs(500)
    assert torch.equal(output(model, case), case.output(loop(500, **inputs)))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_released_files_and_skip_cache(suffix: str, tmp_path: Path) -> None:
    state, path = released(original_dit(), WIDTH, 3), tmp_path / f"released.{suffix}"
    if suffix == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    model = cachekit.wrap(cachekit.load_long_skips(DIT.build(), path), "N2-1000-20", segments="skip-1")
    expected = cachekit.wrap(cachekit.load_long_skips(DIT.build(), state), "N2-1000-20", segments="skip-1")
    assert_equal(generate(model, DIT, TIMES), generate(expected, DIT, TIMES))
    assert [sum(record.recomputed) for record in model.cachekit.stats.records] == [6, 2, 6, 2]


@dataclass
class Settings:
    """Of a training, in a class that torch doesn't know."""

    depth: int = 6


def test_checkpoints_of_the_authors_trainings(tmp_path: Path) -> None:
    """As their trainings write them: averaged weights before others, the command line beside them, under compile and DDP."""
    state = released(original_dit(), WIDTH, 3)
    expected = output(cachekit.load_long_skips(DIT.build(), state), DIT)
    wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
    worse = released(original_dit(), WIDTH, 3, seed=9)
    rest = {"opt": {"state": {}, "param_groups": []}, "args": argparse.Namespace(model="DiT-XL/2")}
    for k, given in enumerate(({"model": worse, "ema": state, **rest}, {"model": state, **rest}, {"ema": wrapped})):
        torch.save(given, tmp_path / f"{k}.pt")
        for source in (tmp_path / f"{k}.pt", given):
            assert torch.equal(output(cachekit.load_long_skips(DIT.build(), source), DIT), expected)  # type: ignore[arg-type]
    torch.save({"ema": state, "args": Settings()}, tmp_path / "other.pt")
    with pytest.raises(cachekit.ConfigError, match=r"if you trust it, torch\.load"):
        cachekit.load_long_skips(DIT.build(), tmp_path / "other.pt")


def test_fusions_alone_leave_the_base_weights() -> None:
    state = released(original_dit(), WIDTH, 3)
    model = cachekit.load_long_skips(DIT.build(), {key: value for key, value in state.items() if key.startswith("skip_")})
    plain = DIT.build().state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items() if not key.startswith("long_skips."))
    assert torch.equal(model.long_skips["0_to_5"].linear.weight, state["skip_linears.2.linear.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.3.mlp.fc1.weight"), r"missing: transformer_blocks.3.ff.net.0.proj.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "unknown: extra"),
        (lambda state: state.update({"x_embedder.proj.bias": torch.zeros(3)}), "another shape: pos_embed.proj.bias"),
        (lambda state: state.pop("skip_norms.2.bias"), "missing: 0_to_5.norm.bias"),
        (lambda state: [state.pop(key) for key in list(state) if ".2." in key and key.startswith("skip")], "has 2 long skip"),
        (lambda state: [state.pop(key) for key in list(state) if ".1." in key and key.startswith("skip")], "missing: 1_to_4.norm"),
        (
            lambda state: [state.update({key.replace(".0.", ".3."): state.pop(key)}) for key in list(state) if "skip" in key],
            "has 4 long skip",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change: Callable[[State], Any], message: str) -> None:
    state = released(original_dit(), WIDTH, 3)
    change(state)
    model = DIT.build()
    before, values = snapshot(model), [value.clone() for value in model.state_dict().values()]
    with pytest.raises(cachekit.ModelError, match=message):
        cachekit.load_long_skips(model, state)
    assert identical(before, snapshot(model))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), values, strict=True))
