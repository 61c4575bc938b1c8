"""The steps of a retrofit: what a step draws, computes, measures and changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.connections import LongSkips
from cachekit.distillation import Features, adjacent, distance, similarity, squared_error
from cachekit.errors import ConfigError, ModelError
from cachekit.stages import Plan, Stage
from cachekit.training_log import Sums
from cachekit.training_state import Average, drawing, is_narrow
from cachekit.tree import replaced, tensors

Pairs = dict[str, list[tuple[Tensor, Tensor]]]


@dataclass
class Training:
    """A retrofit under way.

    Attributes:
        model, long_skips: what is trained.
        original: what it learns from beside the targets.
        data: as in ``retrofit``.
        plan: what is done when.
        frozen: names of parameters that didn't ask for gradients; among them only fusions are trained.
        step: how many steps were done.
    """

    model: nn.Module
    long_skips: LongSkips
    original: nn.Module | None
    data: Callable[[int], Any]
    plan: Plan
    frozen: Collection[str]
    step: int = 0

    def __post_init__(self) -> None:
        self.features = Features(self.model, self.long_skips)
        self.original_features = None if self.original is None else Features(self.original, self.long_skips)
        self.average = None if self.plan.ema is None else Average(self.model, self.plan.ema)
        self.sums = Sums()
        self._begin(self.plan.stages[0])

    def _begin(self, stage: Stage) -> None:
        fusions = set(map(id, self.long_skips.parameters()))
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            left_out = "original" if id(parameter) in fusions else "fusions"
            parameter.requires_grad_(stage.train != left_out and (id(parameter) in fusions or name not in self.frozen))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=stage.lr, weight_decay=0.0)

    @property
    def untrained(self) -> list[str]:
        """Names of the parameters that no stage trains."""
        trains = {stage.train for stage in self.plan.stages}
        fusions = set(map(id, self.long_skips.parameters()))
        found = []
        for name, parameter in self.model.named_parameters():
            fusion = id(parameter) in fusions
            if trains <= {"original" if fusion else "fusions"} or (not fusion and name in self.frozen):
                found.append(name)
        return found

    def state(self) -> dict[str, Any]:
        """All that the steps to come depend on."""
        return {
            "step": self.step,
            "weights": self.model.state_dict(),
            "average": {} if self.average is None else self.average.values,
            "optimiser": self.optimiser.state_dict(),
            "sums": self.sums.values,
            "summed": self.sums.count,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.step = state["step"]
        self.model.load_state_dict(state["weights"])
        if self.average is not None:
            self.average.load(state["average"])
        number, start = self.plan.at(self.step)
        self._begin(self.plan.stages[number])
        if self.step > start:
            self.optimiser.load_state_dict(state["optimiser"])
        device = self.trained[0].device
        self.sums = Sums({key: value.to(device) for key, value in state["sums"].items()}, state["summed"])

    def advance(self) -> None:
        """One step."""
        number, start = self.plan.at(self.step)
        stage = self.plan.stages[number]
        if self.step == start:
            self._begin(stage)
        loss, measured, pairs = self._measure(stage, *self._draw())
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        clip = float("inf") if self.plan.clip is None else self.plan.clip
        norm = nn.utils.clip_grad_norm_(self.trained, clip)
        self.optimiser.step()
        torch.clear_autocast_cache()  # or an autocast around the training would go on with the weights of its first step
        if self.average is not None:
            self.average.update(self.model, self.step)
        self.sums.add({**measured, "gradient": norm})
        self.step += 1
        if self.plan.logs_at(self.step):
            self.sums.latest = {key: value for name, each in pairs.items() for key, value in similarity(name, each).items()}

    def check(self) -> None:
        """Stop before weights that are lost are saved over good ones.

        Raises:
            ModelError: a weight is no finite number.
        """
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.trained):
            raise ModelError(f"training diverged: weights are not finite after step {self.step}; give the stages a lower lr=")

    def _draw(self) -> tuple[dict[str, Any], Tensor]:
        with drawing(self._seed(0), self.trained[0].device), torch.no_grad():
            drawn = self.data(self.step)
        parts = drawn if isinstance(drawn, tuple | list) else [drawn]
        if len(parts) != 2 or not isinstance(drawn[0], Mapping) or not isinstance(drawn[1], Tensor):
            raise ConfigError(
                f"data({self.step}) returned {', '.join(type(part).__name__ for part in parts)}; return (inputs, target): a dict "
                "of the model's arguments, and the tensor that its prediction is compared with"
            )
        narrow = {path: tensor.float() for path, tensor in tensors(drawn[0]) if is_narrow(tensor)}
        return replaced(dict(drawn[0]), narrow), drawn[1]

    def _seed(self, use: int) -> int:
        """Of a step, so that a resumed training draws what one that was never stopped draws; another one for each use."""
        return (self.plan.seed * 1_000_003 + self.step) * 2 + use

    def _predict(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        # The original gets the same seed as the model, so that the two drop the same.
        with drawing(self._seed(1), self.trained[0].device):
            found = tensors(model(**inputs))
        if not found:
            raise ModelError(f"{type(model).__name__} returned no tensor to compare with the target")
        return found[0][1]

    def _measure(self, stage: Stage, inputs: dict[str, Any], target: Tensor) -> tuple[Tensor, dict[str, Tensor], Pairs]:
        """The loss of a step, its terms, and the deep features that the log compares."""
        with self.features.noted() as features:
            prediction = self._predict(self.model, inputs)
        terms = {"target": squared_error(prediction, target)}
        pairs = {"adjacent": adjacent(features)}
        if stage.distill is None or self.original is None or self.original_features is None:
            return terms["target"], {"loss": terms["target"], **terms}, pairs
        with torch.no_grad(), self.original_features.noted() as originals:
            taught = self._predict(self.original, inputs)
        terms |= {"output": squared_error(prediction, taught), "features": distance(features, originals)}
        pairs["original"] = [(features[block], originals[block]) for block in originals]
        loss = torch.stack([getattr(stage.distill, name) * term for name, term in terms.items()]).sum()
        return loss, {"loss": loss, **terms}, pairs
