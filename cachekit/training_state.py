"""What surrounds a training: what is put back after it, the moving average of the weights, and checkpoints."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.errors import ConfigError, ModelError
from cachekit.fusions import seeded

FORMAT = "cachekit retrofit 1"


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Training mode and at least single precision within; afterwards mode, dtypes and requires_grad are as before.

    An autocast around it keeps copies of weights for as long as it lasts, and must not keep those of weights that were changed.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # Updates of 1e-4 are lost in the 8 bits of a bfloat16.
    narrow = {name: tensor.dtype for name, tensor in _tensors(model) if is_narrow(tensor)}
    try:
        for name, tensor in _tensors(model):
            if name in narrow:
                tensor.data = tensor.data.float()
        torch.clear_autocast_cache()
        model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(flags.get(name, True))
        for name, tensor in _tensors(model):
            if name in narrow:
                tensor.data = tensor.data.to(narrow[name])
        torch.clear_autocast_cache()


def is_narrow(tensor: Tensor) -> bool:
    """Whether it is of half precision or less."""
    return tensor.is_floating_point() and tensor.element_size() < 4


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


@contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """A seed for torch's generators of the CPU and of this device, which are as they were afterwards."""
    if device.type != "cuda":
        with seeded(seed):
            yield
        return
    with torch.random.fork_rng(devices=[device]), seeded(seed), torch.cuda.device(device):
        torch.cuda.manual_seed(seed)
        yield


class Average:
    """The exponential moving average of a model's parameters."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the weights behind a step (counted from 0)."""
        # A fixed decay would average over the untrained fusions for the first thousands of steps.
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.values[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Give the model the averaged weights."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.values[name])

    def load(self, values: dict[str, Tensor]) -> None:
        """Go on from values that were saved."""
        for name, value in self.values.items():
            value.copy_(values[name])


def digest(model: nn.Module) -> str:
    """Tells one set of weights from another."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all: whoever stops the program in the middle finds the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_checkpoint(path: Path, facts: dict[str, str]) -> dict[str, Any] | None:
    """The checkpoint that stands there, or None.

    Args:
        path: of the file.
        facts: what must be the same as when it was written.

    Raises:
        ConfigError: it is no checkpoint of ``retrofit``, or one of another plan.
        ModelError: it is one of another model, or of other weights to learn from.
    """
    if not path.exists():
        return None
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"checkpoint={str(path)!r} can't be read ({error}); give another path, or remove it") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConfigError(f"checkpoint={str(path)!r} is no checkpoint of cachekit.retrofit; give another path")
    for fact, says in (
        ("model", "another model; build the one that it was written for"),
        ("fusions", "other long skip connections; add those that it was written for"),
        ("frozen", "a retrofit that trained other weights; freeze those that were frozen when it began"),
        ("original", "a retrofit that learns from other weights; give the model with the weights that it began with"),
    ):
        if state[fact] != facts[fact]:
            raise ModelError(f"checkpoint={str(path)!r} is of {says}, or give another path")
    if state["plan"] != facts["plan"]:
        raise ConfigError(
            f"checkpoint={str(path)!r} is of a retrofit with other settings: {state['plan']}, here {facts['plan']}; write them as "
            "they were, or give another path"
        )
    return state
