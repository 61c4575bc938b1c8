"""The weights that come with the package: half precision on disk, float32 in memory."""

from __future__ import annotations

from importlib import resources
from typing import TypeVar

from safetensors.torch import load
from torch import Tensor, nn

from cachekit.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def stored_weights(name: str) -> dict[str, Tensor]:
    """A file of the package's weights.

    Raises:
        ConfigError: there is none of that name.
    """
    path = resources.files("cachekit.demo").joinpath(f"weights/{name}.safetensors")
    if not path.is_file():
        raise ConfigError(f"this version of cachekit comes without {name}.safetensors; train it with the scripts in training/")
    return {key: value.float() for key, value in load(path.read_bytes()).items()}


def with_weights(model: M, name: str) -> M:
    """The model with the package's weights of that name in it, in evaluation mode."""
    model.load_state_dict(stored_weights(name))
    return model.eval()
