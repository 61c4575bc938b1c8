"""Checkpoints of a retrofit: a resumed one equals one that was never stopped; those of something else are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from retrofitting import FUSIONS, STAGES, Stopped, built, data_of, run, same, state_of
from torch import Tensor
from zoo import DIT, LATTE

import cachekit
from cachekit import Distillation, Stage


@pytest.mark.parametrize(
    ("case", "stop", "every"),
    [*((DIT, stop, 1) for stop in range(9)), *((DIT, stop, 3) for stop in (2, 5, 7)), *((LATTE, stop, 1) for stop in (3, 4, 8))],
    ids=str,
)
def test_a_resumed_run_equals_one_that_was_never_stopped(case: Case, stop: int, every: int, tmp_path: Path) -> None:
    """With whatever state torch's generators are in, with dropped labels, and with a log whose last lines are written again."""
    options: dict[str, Any] = {"save_every": every, "log_every": 3, "seed": 2}
    expected = run(built(case), case, *STAGES, **options, log=tmp_path / "a.jsonl")

    def until(step: int) -> tuple[dict[str, Any], Tensor]:
        if step == stop:
            raise Stopped
        return data_of(case)(step)

    options |= {"checkpoint": tmp_path / "b.pt", "log": tmp_path / "b.jsonl"}
    torch.manual_seed(7)
    with pytest.raises(Stopped):
        cachekit.retrofit(built(case), until, stages=STAGES, progress=False, **options)
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"step": 9, "stage": 2, "loss": 1}\n{"st')
    saved = ["b.pt"] if stop >= every else []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", *saved]
    resumed = built(case)
    assert same(run(resumed, case, *STAGES, **options), expected)
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    # Over with: nothing is drawn any more, and the weights are those.
    done = built(case)
    cachekit.retrofit(done, until, stages=STAGES, progress=False, **options)
    assert same(state_of(done), expected)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stage = tmp_path / "run.pt", Stage(steps=3, train="fusions")
    save, written = torch.save, []

    def fails(state: Any, file: Any) -> None:
        written.append(state["step"])
        save(state, file)
        if len(written) == 2:
            raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space"):
        run(built(DIT), DIT, stage, checkpoint=path, save_every=1)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.load(path, weights_only=True)["step"] == 1


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    stage = Stage(steps=2, train="all", distill=Distillation())
    model = built(DIT)
    run(model, DIT, stage, checkpoint=path)
    raw = path.read_bytes()
    half_frozen = built(DIT)
    half_frozen.transformer_blocks.requires_grad_(False)
    for other, stages, says in (
        (built(LATTE), [stage], "of another model"),
        (built(DIT, "paper"), [stage], "other long skip connections"),
        (cachekit.add_long_skips(DIT.build(), pairs=[(0, 5)]), [stage], "other long skip connections"),
        (copy.deepcopy(model), [stage], "the weights that it began with"),
        (half_frozen, [stage], "freeze those that were frozen"),
        (built(DIT), [stage, FUSIONS], "other settings"),
        (built(DIT), [stage.model_copy(update={"lr": 1e-3})], "other settings"),
    ):
        before = state_of(other)
        with pytest.raises(cachekit.CachekitError, match=says):
            run(other, DIT, *stages, checkpoint=path)
        assert same(state_of(other), before) and path.read_bytes() == raw
    torch.save({"weights": {}}, path)
    with pytest.raises(cachekit.ConfigError, match=r"no checkpoint of cachekit\.retrofit"):
        run(built(DIT), DIT, stage, checkpoint=path)
    path.write_bytes(raw[:1000])
    with pytest.raises(cachekit.ConfigError, match="can't be read"):
        run(built(DIT), DIT, stage, checkpoint=path)
