"""Long skip connections in models that torch.distributed shards or copies, here with one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adding import output, shaken
from cases import Case
from running import TIMES, generate, ran
from torch import distributed, nn
from zoo import DIT, LATTE, SD3

import cachekit
from cachekit.policies import every

sharding = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(sharding, "fully_shard"):
    pytest.skip("needs torch 2.6", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(model: Any, fusions: bool = False) -> Any:
    """Each block by itself, then the rest; or each fusion by itself too."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    blocks = [*model.transformer_blocks, *getattr(model, "temporal_transformer_blocks", [])]
    for module in [*blocks, *(model.long_skips.values() if fusions else []), model]:
        sharding.fully_shard(module, mesh=mesh)
    return model


def built(case: Case, seed: int = 5) -> Any:
    return shaken(cachekit.add_long_skips(case.build(), fusion="paper", seed=0), seed)


def trained(model: Any, case: Case) -> None:
    """With an optimiser made before any call, since calls put other parameters into a sharded model."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(2):
        optimiser.zero_grad()
        output(model, case).square().mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()


@pytest.mark.parametrize("fusions", [False, True], ids=["whole", "each fusion"])
@pytest.mark.parametrize("case", [SD3, LATTE], ids=str)
def test_fully_sharded(case: Case, fusions: bool, tmp_path: Path) -> None:
    """Sampling, training, saving and loading equal those of the model that isn't sharded. (diffusers' DiT can't be, plain.)"""
    plain, model = built(case), sharded(built(case), fusions)
    before, keys = [parameter.detach().clone() for parameter in plain.long_skips.parameters()], list(plain.state_dict())
    trained(plain, case)
    trained(model, case)
    with torch.no_grad():
        assert torch.allclose(output(model, case), output(plain, case), rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys
    cachekit.save_long_skips(model, tmp_path / "skips.safetensors")
    other = cachekit.load_long_skips(case.build(), tmp_path / "skips.safetensors")
    fusions_of = [list(each.long_skips.parameters()) for each in (other, plain)]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*fusions_of, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(fusions_of[0], before, strict=True))
    with torch.no_grad():
        expected = generate(cachekit.wrap(plain, every(2), segments="skip-1"), case, TIMES)
        found = generate(cachekit.wrap(model, every(2), segments="skip-1"), case, TIMES)
    assert sum(ran(model)) == 2 * case.unit
    # Weights that are gathered lie elsewhere in memory, and products of vectors that are aligned otherwise round otherwise.
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_wrapped_in_an_older_fsdp_and_in_ddp() -> None:
    plain = built(DIT)
    with torch.no_grad():
        expected = output(plain, DIT)
    policy = sharding.wrap.ModuleWrapPolicy({type(plain.transformer_blocks[0])})
    cpu = torch.device("cpu")
    for outer in (
        sharding.FullyShardedDataParallel(built(DIT), use_orig_params=True, auto_wrap_policy=policy, device_id=cpu),
        nn.parallel.DistributedDataParallel(built(DIT), find_unused_parameters=True),
    ):
        with torch.no_grad():
            assert torch.equal(DIT.output(outer(**DIT.inputs(500))), expected)
        before = [parameter.detach().clone() for name, parameter in outer.named_parameters() if "long_skips" in name]
        trained(outer, DIT)
        after = [parameter for name, parameter in outer.named_parameters() if "long_skips" in name]
        assert len(after) == 12 and not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
