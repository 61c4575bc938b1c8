"""The weights that come with the package: half precision on disk, float32 in memory."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TypeVar

from safetensors.torch import load
from torch import Tensor, nn

from cachekit.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def stored_weights(where: str | Path) -> dict[str, Tensor]:
    """A file of the package's weights by its name, or another one by its path.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(where, Path):
        if not where.is_file():
            raise ConfigError(f"there is no file of weights {str(where)!r}; give what a script in training/ exports")
        return {key: value.float() for key, value in load(where.read_bytes()).items()}
    path = resources.files("cachekit.demo").joinpath(f"weights/{where}.safetensors")
    if not path.is_file():
        raise ConfigError(f"this version of cachekit comes without {where}.safetensors; train it with the scripts in training/")
    return {key: value.float() for key, value in load(path.read_bytes()).items()}


def with_weights(model: M, where: str | Path) -> M:
    """The model with such weights in it, in evaluation mode.

    Raises:
        ConfigError: there is no such file, or it is of another model.
    """
    weights = stored_weights(where)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{where} holds another model's weights: {str(error).splitlines()[-1].strip()}") from error
    return model.eval()
