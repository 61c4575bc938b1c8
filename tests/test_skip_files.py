"""Saving and loading long skip connections."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import original_zoo
import pytest
import torch
from adding import Mean, output, shaken
from cases import Case
from running import TIMES, assert_equal, generate
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from wrapping import identical, snapshot
from zoo import DIT, LATTE, SD3, deeper

import cachekit
from cachekit.policies import every

State = dict[str, Tensor]
some_cases = pytest.mark.parametrize("case", [DIT, LATTE, SD3], ids=str)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_an_adapter_that_counts_otherwise_is_refused(tmp_path: Path) -> None:
    """Pairs of units name other blocks under another adapter; nothing of shapes or names would show it."""
    path, twos = tmp_path / "new" / "skips.safetensors", cachekit.Adapter(unit=2)
    model = shaken(cachekit.add_long_skips(DIT.build(), adapter=twos))
    cachekit.save_long_skips(model, path)
    for other in (DIT.build(), cachekit.add_long_skips(DIT.build(), pairs=[(0, 2)])):
        before = snapshot(other)
        with pytest.raises(cachekit.ConfigError, match=r"s\.1 to .*s\.4, .* from .*s\.0 to .*s\.2; give the adapter="):
            cachekit.load_long_skips(other, path)
        assert identical(before, snapshot(other))
    assert torch.equal(output(cachekit.load_long_skips(DIT.build(), path, adapter=twos), DIT), output(model, DIT))


def test_a_width_that_nothing_tells(tmp_path: Path) -> None:
    """It is in the file."""
    model = shaken(cachekit.add_long_skips(Bare(), width=6))
    cachekit.save_long_skips(model, tmp_path / "skips.safetensors")
    other = cachekit.load_long_skips(Bare(), tmp_path / "skips.safetensors")
    x = torch.randn(2, 3, 6)
    assert torch.equal(other(x), model(x)) and not torch.equal(other(x), Bare()(x))


class Scaled(nn.Module):
    """A block without a norm or a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Bare(nn.Module):
    """A stack of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scaled() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@some_cases
@pytest.mark.parametrize("fusion", ["paper", "residual", "spectral"])
def test_round_trip(case: Case, fusion: str, tmp_path: Path) -> None:
    model = shaken(cachekit.add_long_skips(case.build(), fusion=fusion, seed=0))
    cachekit.save_long_skips(model, tmp_path / "skips.safetensors")
    state = torch.get_rng_state()
    other = cachekit.load_long_skips(case.build(), tmp_path / "skips.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert other.long_skips.fusion == fusion and other.long_skips.pairs == model.long_skips.pairs
    assert torch.equal(output(other, case), output(model, case))
    there = cachekit.add_long_skips(case.build(), fusion=fusion)
    assert cachekit.load_long_skips(there, str(tmp_path / "skips.safetensors")) is there
    assert torch.equal(output(there, case), output(model, case))


def test_other_pairs_and_a_wrapped_model(tmp_path: Path) -> None:
    model = shaken(cachekit.add_long_skips(DIT.build(), pairs=[(2, 4), (0, 3)]))
    cachekit.save_long_skips(model, tmp_path / "skips.safetensors")
    other = cachekit.load_long_skips(cachekit.wrap(DIT.build(), every(2)), tmp_path / "skips.safetensors")
    assert other.long_skips.pairs == ((0, 3), (2, 4))
    assert_equal(generate(other, DIT, TIMES), generate(cachekit.wrap(model, every(2)), DIT, TIMES))


def test_a_file_holds_nothing_else(tmp_path: Path) -> None:
    model = cachekit.add_long_skips(DIT.build())
    cachekit.save_long_skips(model, tmp_path / "skips.safetensors")
    held = sum(parameter.numel() * 4 for parameter in model.long_skips.parameters())
    assert held < (tmp_path / "skips.safetensors").stat().st_size < held + 4096


def test_a_state_dict_loads_into_a_model_that_has_them() -> None:
    model = shaken(cachekit.add_long_skips(DIT.build(), fusion="paper", seed=0))
    state = model.state_dict()
    with pytest.raises(cachekit.ConfigError, match=r"add_long_skips\(model, fusion=...\) first"):
        cachekit.load_long_skips(DIT.build(), state)
    under_ddp = {f"module.{key}": value for key, value in state.items()}
    for given in (state, under_ddp, {"ema": under_ddp}):
        other = cachekit.load_long_skips(cachekit.add_long_skips(DIT.build(), fusion="paper"), given)  # type: ignore[arg-type]
        assert torch.equal(output(other, DIT), output(model, DIT))


def test_fusions_of_a_users_own(tmp_path: Path) -> None:
    path = tmp_path / "skips.safetensors"
    model = shaken(cachekit.add_long_skips(DIT.build(), fusion=Mean))
    cachekit.save_long_skips(model, path)
    with pytest.raises(cachekit.ConfigError, match=r"custom Mean.*add_long_skips"):
        cachekit.load_long_skips(DIT.build(), path)
    other = cachekit.load_long_skips(cachekit.add_long_skips(DIT.build(), fusion=Mean), path)
    assert torch.equal(output(other, DIT), output(model, DIT))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (deeper(DIT, 4), "blocks 6, here 4"),
        (SD3, "class DiTTransformer2DModel, here SD3Transformer2DModel"),
        (original_zoo.DIT, "class DiTTransformer2DModel, here DiT"),
    ],
    ids=str,
)
def test_another_model_is_refused_and_unchanged(other: Case, message: str, tmp_path: Path) -> None:
    cachekit.save_long_skips(cachekit.add_long_skips(DIT.build()), tmp_path / "skips.safetensors")
    model = other.build()
    before = snapshot(model)
    with pytest.raises(cachekit.ModelError, match=message):
        cachekit.load_long_skips(model, tmp_path / "skips.safetensors")
    assert identical(before, snapshot(model))


def test_other_shapes_are_another_model(tmp_path: Path) -> None:
    cachekit.save_long_skips(cachekit.add_long_skips(original_zoo.DIT.build()), tmp_path / "skips.safetensors")
    model = original_zoo.DIT.build()
    model.y_embedder = nn.Embedding(5, 24)
    with pytest.raises(cachekit.ModelError, match="names or shapes of parameters"):
        cachekit.load_long_skips(model, tmp_path / "skips.safetensors")


def test_what_holds_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cachekit.ConfigError, match="no long skip connections in it"):
        cachekit.load_long_skips(DIT.build(), DIT.build().state_dict())
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(cachekit.ConfigError, match="no long skip connections in it"):
        cachekit.load_long_skips(DIT.build(), tmp_path / "other.safetensors")
    with pytest.raises(cachekit.ConfigError, match=r"state\['weights'\]"):
        cachekit.load_long_skips(DIT.build(), {"weights": {}, "optimiser": {}})  # type: ignore[dict-item]
    with pytest.raises(cachekit.ModelError, match="add_long_skips"):
        cachekit.save_long_skips(DIT.build(), tmp_path / "skips.safetensors")


@pytest.mark.parametrize(
    "name", ["a.pt", "a.safetensors", "b.pt", "empty.pt", "empty.safetensors", "missing.pt", "missing.safetensors"]
)
def test_what_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    if name == "b.pt":
        torch.save([1, 2], tmp_path / name)
    elif not name.startswith("missing"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"neither")
    model = DIT.build()
    before = snapshot(model)
    with pytest.raises(cachekit.ConfigError, match=r"can't be read|holds a list"):
        cachekit.load_long_skips(model, tmp_path / name)
    assert identical(before, snapshot(model))


def test_a_file_that_says_too_little_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "skips.safetensors"
    cachekit.save_long_skips(cachekit.add_long_skips(DIT.build()), path)
    with safe_open(path, "pt") as file:
        state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    for key in ("fusion", "pairs", "blocks", "widths"):
        save_file(state, path, {name: value for name, value in metadata.items() if name != key})
        with pytest.raises(cachekit.ConfigError, match=f"doesn't say its {key}"):
            cachekit.load_long_skips(DIT.build(), path)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "skips.safetensors"):
        with pytest.raises(cachekit.ConfigError, match="can't be written"):
            cachekit.save_long_skips(cachekit.add_long_skips(DIT.build()), path)


def test_what_is_no_source_and_no_model_is_refused() -> None:
    with pytest.raises(cachekit.ConfigError, match=r"source=NoneType: give a file's path"):
        cachekit.load_long_skips(DIT.build(), None)  # type: ignore[arg-type]
    with pytest.raises(cachekit.ModelError, match=r"pipe\.transformer"):
        cachekit.load_long_skips("model", {})  # type: ignore[type-var]


def test_a_file_of_any_name(tmp_path: Path) -> None:
    model = shaken(cachekit.add_long_skips(DIT.build()))
    cachekit.save_long_skips(model, tmp_path / "skips.pt")
    assert torch.equal(output(cachekit.load_long_skips(DIT.build(), tmp_path / "skips.pt"), DIT), output(model, DIT))


def test_others_than_the_models_are_refused(tmp_path: Path) -> None:
    cachekit.save_long_skips(cachekit.add_long_skips(DIT.build()), tmp_path / "skips.safetensors")
    for options in ({"fusion": "paper"}, {"pairs": [(0, 5)]}):
        model = cachekit.add_long_skips(DIT.build(), **options)
        with pytest.raises(cachekit.ConfigError, match="other long skip connections"):
            cachekit.load_long_skips(model, tmp_path / "skips.safetensors")
    with pytest.raises(cachekit.ModelError, match=r"missing: .*unknown: "):
        cachekit.load_long_skips(model, cachekit.add_long_skips(DIT.build(), pairs=[(1, 4)]).state_dict())


def test_without_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = cachekit.add_long_skips(DIT.build())
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        monkeypatch.setitem(sys.modules, name, None)
    for call in (cachekit.save_long_skips, cachekit.load_long_skips):
        with pytest.raises(cachekit.ConfigError, match="pip install safetensors"):
            call(model, tmp_path / "skips.safetensors")
