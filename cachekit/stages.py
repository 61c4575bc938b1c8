"""What a retrofit is told: its stages, what each of them trains, and against what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from cachekit.errors import ConfigError


class _Said(BaseModel):
    """Frozen values that somebody wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    if not TYPE_CHECKING:  # type checkers see the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                said = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
                raise ConfigError(f"{type(self).__name__}: {said}; {self._help()}") from None

    @classmethod
    def _help(cls) -> str:
        return f"it takes {', '.join(f'{name}=' for name in cls.model_fields)}"


class Distillation(_Said):
    """Learning from the original: the model as it was given, without its long skip connections, frozen.

    Attributes:
        target: weight of the mean squared error to what ``data`` returns.
        output: weight of the mean squared error to the original's prediction.
        features: weight of the relative squared error to the original's deep features, that is to what each block with a long
            skip connection returns: ||x - y||² / ||y||², averaged over these blocks.
    """

    target: NonNegativeFloat = 1.0
    output: NonNegativeFloat = 1.0
    features: NonNegativeFloat = 1.0


class Stage(_Said):
    """A stretch of training with one optimiser.

    Attributes:
        steps: how many.
        train: ``"fusions"`` alone; or ``"all"``: every weight that asked for gradients when ``retrofit`` was called, too; or
            ``"original"``: these alone. With residual fusions that were just added, which change nothing, the last is the
            control that a retrofit must be held against: the original trained on for as long.
        lr: AdamW's learning rate, constant.
        distill: what is learned from the original beside the target; None leaves it out.
    """

    steps: PositiveInt
    train: Literal["fusions", "all", "original"]
    lr: PositiveFloat = 1e-4
    distill: Distillation | None = None

    @classmethod
    def _help(cls) -> str:
        return (
            "write cachekit.Stage(steps=1000, train='fusions'), or train='all' or 'original'; lr= and "
            "distill=cachekit.Distillation() if needed"
        )


# Skip-DiT (arXiv 2411.17616) trains the fusions first, then everything. How long is ours to say: the paper's models are larger.
STAGES = (Stage(steps=2_000, train="fusions"), Stage(steps=10_000, train="all"))


class Plan(_Said):
    """All of a retrofit that decides what its weights become. A checkpoint goes with one plan."""

    stages: tuple[Stage, ...] = Field(min_length=1)
    seed: NonNegativeInt
    ema: float | None = Field(ge=0, lt=1)
    clip: PositiveFloat | None
    log_every: PositiveInt
    save_every: PositiveInt = Field(exclude=True)

    @classmethod
    def _help(cls) -> str:
        return "write cachekit.retrofit(model, data, stages=[cachekit.Stage(steps=1000, train='fusions'), ...])"

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def logs_at(self, done: int) -> bool:
        """Whether the log has a line behind so many steps: every so often, and where a stage ends, since terms may change."""
        return done % self.log_every == 0 or done == self.steps or self.at(done)[1] == done

    def at(self, step: int) -> tuple[int, int]:
        """The stage that a step belongs to, and the step at which it starts."""
        start = 0
        for number, stage in enumerate(self.stages[:-1]):
            if step < start + stage.steps:
                return number, start
            start += stage.steps
        return len(self.stages) - 1, start
