"""Train the long skip connections of a pre-trained model, then the model with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cachekit.connections import LongSkips
from cachekit.distillation import original_of
from cachekit.errors import ConfigError, ModelError
from cachekit.long_skips import check_module, long_skips_of
from cachekit.skip_source import fingerprint
from cachekit.stages import STAGES, Plan, Stage
from cachekit.training import Training
from cachekit.training_log import TrainingLog, progress_bar
from cachekit.training_state import digest, in_training, read_checkpoint, write_checkpoint

M = TypeVar("M", bound=nn.Module)
Data = Callable[[int], tuple[Mapping[str, Any], Tensor]]
Where = str | os.PathLike[str]


def retrofit(
    model: M,
    data: Data,
    *,
    stages: Sequence[Stage] = STAGES,
    seed: int = 0,
    ema: float | None = 0.9999,
    clip: float | None = 0.1,
    checkpoint: Where | None = None,
    save_every: int = 500,
    log: Where | None = None,
    plot: Where | None = None,
    log_every: int = 50,
    progress: bool = True,
) -> M:
    """Train a model to which long skip connections were added (Skip-DiT, arXiv 2411.17616): the fusions first, then everything.

    AdamW without weight decay at 1e-4, gradients clipped at 0.1 and averaged weights are the paper's. The model trains in
    training mode and at least single precision, and has its modes, dtypes and ``requires_grad`` back afterwards, whatever
    happens. A training that is resumed from its checkpoint equals one that was never stopped, bit for bit on a CPU.

    Args:
        model: any module with ``add_long_skips``; changed in place.
        data: step (0, 1, ... over all stages) -> (inputs, target): the model's keyword arguments, and the tensor to which the
            first tensor that it returns is compared; where the target has half the channels (no learned variance), the
            prediction's first half is. What it draws from torch's global generators is seeded by the step.
        stages: what to train for how long, and whether to learn from the original as well.
        seed: of everything drawn.
        ema: decay of the averaged weights, which the model has in the end; smaller in the first steps. None: the last weights.
        clip: largest norm of the gradients; None doesn't clip.
        checkpoint: file to write every ``save_every`` steps, and to go on from where it exists.
        log: JSONL file, a line every ``log_every`` steps: loss and its terms, the gradient's norm, and the cosine and relative
            L2 distance of deep features: adjacent blocks', and the original's where a stage learns from it.
        plot: PNG file to draw the log to; needs matplotlib.
        progress: show a bar; needs tqdm, and is silent without.

    Returns:
        The same model.

    Raises:
        ModelError: no long skip connections, none that train, or a checkpoint of another model.
        ConfigError: settings or data that can't mean what was written, or a checkpoint of other settings.
    """
    given = tuple(stages) if isinstance(stages, Sequence) else stages
    plan = Plan(stages=given, seed=seed, ema=ema, clip=clip, log_every=log_every, save_every=save_every)
    long_skips = _check(model, data, plan)
    written = TrainingLog(log, plot)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    handle = model.__dict__.get("cachekit")
    whole = handle.disabled() if handle is not None else nullcontext()
    with in_training(model), whole, torch.inference_mode(False), torch.enable_grad():
        original = original_of(model) if any(stage.distill for stage in plan.stages) else None
        training = Training(model, long_skips, original, data, plan, frozen)
        try:
            _run(training, None if checkpoint is None else Path(checkpoint), written, progress)
        finally:
            training.features.remove()
        if training.average is not None:
            training.average.put_into(model)
    return model


def _run(training: Training, checkpoint: Path | None, log: TrainingLog, progress: bool) -> None:
    plan = training.plan
    facts = _facts(training)
    saved = read_checkpoint(checkpoint, facts) if checkpoint is not None else None
    if saved is not None:
        training.load(saved)
    log.start(training.step)
    bar = progress_bar(plan.steps, training.step, progress)
    with bar if bar is not None else nullcontext():
        while training.step < plan.steps:
            training.advance()
            step = training.step
            if plan.logs_at(step):
                means = training.sums.take()
                log.write(step, plan.at(step - 1)[0] + 1, means)
                if bar is not None:
                    bar.set_postfix(loss=means["loss"], refresh=False)
            if step % plan.save_every == 0 or step == plan.steps:
                training.check()
                log.draw()
                if checkpoint is not None:
                    write_checkpoint(checkpoint, {**facts, **training.state()})
            if bar is not None:
                bar.update()


def _facts(training: Training) -> dict[str, str]:
    """What tells this training from others."""
    long_skips = training.long_skips
    return {
        "model": json.dumps(fingerprint(training.model)),
        "fusions": f"{long_skips.fusion} {long_skips.pairs}",
        "frozen": ", ".join(training.untrained),
        "original": "" if training.original is None else digest(training.original),
        "plan": training.plan.model_dump_json(),
    }


def _check(model: Any, data: Any, plan: Plan) -> LongSkips:
    check_module(model)
    long_skips = long_skips_of(model)
    if long_skips is None:
        raise ModelError("the model has no long skip connections to train; cachekit.add_long_skips(model) first")
    if not any(True for _ in long_skips.parameters()):
        raise ModelError(f"the fusions ({long_skips.fusion}) have no parameters to train")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError("some weights were made under torch.inference_mode and can't be trained; build the model outside of it")
    own = set(map(id, long_skips.parameters()))
    asks = any(parameter.requires_grad and id(parameter) not in own for parameter in model.parameters())
    more = next((stage.train for stage in plan.stages if stage.train != "fusions"), None)
    if not asks and more is not None:
        raise ModelError(f"a stage trains {more!r}, and every weight but the fusions' is frozen; model.requires_grad_(True) first")
    if not callable(data):
        raise ConfigError(f"data={type(data).__name__}: give a function of the step that returns (inputs, target)")
    return long_skips
