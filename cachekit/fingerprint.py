"""What a calibration or a plan was made for, told from every other model."""

from __future__ import annotations

from pydantic import BaseModel, NonNegativeInt
from torch import nn

from cachekit.errors import ConfigError
from cachekit.json_files import FROZEN


class Fingerprint(BaseModel):
    """What tells one model from another.

    Attributes:
        name: of its class.
        blocks: how many blocks there are.
        parameters: digest of the parameters' names and shapes (not of their values: a finetuned model has the same).
        long_skips: fusion and pairs of long skip connections that were added.
    """

    model_config = FROZEN

    name: str
    blocks: NonNegativeInt
    parameters: str
    long_skips: tuple[str, tuple[tuple[NonNegativeInt, NonNegativeInt], ...]] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of a model, wrapped or not."""
        from cachekit.long_skips import long_skips_of
        from cachekit.skip_source import fingerprint

        base, found = fingerprint(model), long_skips_of(model)
        added = None if found is None else (found.fusion, found.pairs)
        return cls(name=base["class"], blocks=base["blocks"], parameters=base["parameters"], long_skips=added)

    def check(self, model: nn.Module, what: str) -> None:
        """Compare a model with the one that something was made for.

        Raises:
            ConfigError: it is another one.
        """
        ours = Fingerprint.of(model)
        if ours == self:
            return
        wanted, found = self.model_dump(), ours.model_dump()
        said = [f"{key} {wanted[key]}, here {found[key]}" for key in ("name", "blocks", "long_skips") if wanted[key] != found[key]]
        differs = "; ".join(said) or "other names or shapes of parameters"
        raise ConfigError(f"this {what} was made for another model ({differs}); calibrate and search on this one")
