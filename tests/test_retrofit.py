"""Retrofitting: what a stage trains, what a checkpoint holds, what is learned from the original, and what is put back."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import original_zoo
import pytest
import torch
from adding import shaken
from cases import Case
from torch import Tensor, nn
from zoo import DIT, FLUX, LATTE, SD3

import cachekit
from cachekit import Distillation, Stage
from cachekit.distillation import Features, adjacent, distance, original_of, similarity, squared_error
from cachekit.long_skips import long_skips_of
from cachekit.training_log import read_log

State = dict[str, Tensor]
Data = Callable[[int], tuple[dict[str, Any], Tensor]]
some_cases = pytest.mark.parametrize("case", [DIT, LATTE], ids=str)


def data_of(case: Case) -> Data:
    """Noise to be predicted, drawn from torch's global generator, for which ``retrofit`` answers."""

    def data(step: int) -> tuple[dict[str, Any], Tensor]:
        inputs = case.inputs(float(torch.randint(1, 999, ())), seed=step)
        return inputs, torch.randn_like(inputs[case.names[0]])

    return data


def built(case: Case, fusion: str = "residual") -> Any:
    return cachekit.add_long_skips(case.build(), fusion=fusion, seed=0)


def state_of(model: nn.Module) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def run(model: Any, case: Case, *stages: Stage, **options: Any) -> State:
    cachekit.retrofit(model, data_of(case), stages=stages, **{"progress": False, **options})
    return state_of(model)


@pytest.mark.parametrize("case", [DIT, LATTE, SD3, FLUX, original_zoo.LATTE], ids=str)
def test_the_first_stage_changes_the_fusions_alone(case: Case) -> None:
    model = built(case)
    before = state_of(model)
    after = run(model, case, Stage(steps=2, train="fusions"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.startswith("long_skips.")}


@some_cases
def test_the_second_stage_changes_everything_but_what_was_frozen(case: Case) -> None:
    model = built(case, "paper")
    kept = next(name for name, _ in model.named_parameters() if "attn" in name and name.endswith("weight"))
    model.get_parameter(kept).requires_grad_(False)
    before = state_of(model)
    run(model, case, Stage(steps=2, train="fusions"), Stage(steps=2, train="all"), ema=None)
    unused = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    plain = case.build()
    inputs, _ = data_of(case)(0)
    case.output(plain(**inputs)).square().sum().backward()  # type: ignore[no-untyped-call]
    blind = {name for name, parameter in plain.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert kept in unused and unused <= blind | {kept}


STAGES = (
    Stage(steps=4, train="fusions", distill=Distillation(target=0.5)),
    Stage(steps=5, train="all", lr=1e-3),
)


class Stopped(Exception):
    pass


@some_cases
@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8])
def test_a_resumed_run_equals_one_that_was_never_stopped(case: Case, stop: int, tmp_path: Path) -> None:
    """With whatever state torch's generators are in, with dropped labels, and with a log whose last lines are written again."""
    options: dict[str, Any] = {"save_every": 1, "log_every": 3, "seed": 2}
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "b.pt"]
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


def test_the_average_equals_a_plain_loop() -> None:
    """Written out: AdamW at 1e-4 without weight decay, gradients clipped at 0.1, and the average."""
    steps, decay = 6, 0.4
    data = [data_of(DIT)(step) for step in range(steps)]
    model = cachekit.retrofit(built(DIT), data.__getitem__, stages=[Stage(steps=steps, train="all")], ema=decay, progress=False)
    plain = built(DIT).train()
    optimiser = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)
    average = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for step, (inputs, target) in enumerate(data):
        with torch.random.fork_rng():
            torch.manual_seed(step * 2 + 1)
            loss = (plain(**inputs).sample[:, :4] - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimiser.step()
        rate = min(decay, (1 + step) / (10 + step))
        for name, parameter in plain.named_parameters():
            average[name] += (1 - rate) * (parameter.detach() - average[name])
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, average[name], rtol=1e-6, atol=1e-7), name


def features_of(model: nn.Module, case: Case, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    features = Features(model, long_skips_of(model) or built(case).long_skips)
    with features.noted() as found:
        prediction = case.output(model(**inputs))
    features.remove()
    return found, prediction


@some_cases
def test_distillation_is_zero_at_a_residual_insertion_and_gradients_flow(case: Case) -> None:
    model = built(case)
    inputs, _ = data_of(case)(0)
    original = original_of(model)
    assert not hasattr(original, "long_skips") and not any(p.requires_grad for p in original.parameters())
    (ours, prediction), (theirs, taught) = features_of(model, case, inputs), features_of(original, case, inputs)
    assert ours.keys() == theirs.keys() == {connection.late for connection in model.long_skips.connections}
    assert distance(ours, theirs).item() == 0 and squared_error(prediction, taught).item() == 0
    ours, _ = features_of(shaken(model), case, inputs)
    lost = distance(ours, theirs)
    assert lost.item() > 0
    lost.backward()  # type: ignore[no-untyped-call]
    assert all(bool(parameter.grad.any()) for parameter in model.long_skips.parameters())
    assert all(parameter.grad is None for parameter in original.parameters())


@some_cases
def test_similarity_is_cosine_by_token_and_relative_distance(case: Case) -> None:
    found, _ = features_of(built(case), case, data_of(case)(0)[0])
    values = list(found.values())
    said = similarity("adjacent", adjacent(found))
    cosines = [torch.cosine_similarity(x, y, dim=-1).mean() for x, y in pairwise(values)]
    distances = [(y - x).norm() / x.norm() for x, y in pairwise(values)]
    assert torch.allclose(said["adjacent cosine"], torch.stack(cosines).mean(), atol=1e-6)
    assert torch.allclose(said["adjacent distance"], torch.stack(distances).mean(), atol=1e-6)


def test_the_original_drops_the_labels_that_the_model_drops(tmp_path: Path) -> None:
    """Or it would teach the prediction for a class where the model is asked without one."""
    model = built(DIT)
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.5
    run(model, DIT, Stage(steps=1, train="fusions", distill=Distillation()), log=tmp_path / "log.jsonl")
    assert read_log(tmp_path / "log.jsonl")[0]["output"] == 0


@some_cases
@pytest.mark.parametrize("distill", [None, Distillation()], ids=["target", "distilled"])
def test_the_loss_falls_on_a_fixed_batch(case: Case, distill: Distillation | None, tmp_path: Path) -> None:
    inputs, target = data_of(case)(0)
    stages = [Stage(steps=20, train=train, lr=3e-3, distill=distill) for train in ("fusions", "all")]
    model = built(case, "paper")
    cachekit.retrofit(model, lambda step: (inputs, target), stages=stages, log=tmp_path / "log.jsonl", log_every=5, progress=False)
    losses = [line["loss"] for line in read_log(tmp_path / "log.jsonl")]
    assert losses[3] < losses[0] and losses[-1] < 0.9 * losses[3]


def test_the_log_and_its_picture(tmp_path: Path) -> None:
    run(built(DIT), DIT, *STAGES, log=tmp_path / "new" / "log.jsonl", plot=tmp_path / "new" / "log.png", log_every=3)
    lines = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    # Every third, and the last of a stage.
    assert [(line["step"], line["stage"]) for line in lines] == [(3, 1), (4, 1), (6, 2), (9, 2)]
    first = ["step", "stage", "loss", "target", "output", "features", "gradient"]
    similar = ["adjacent cosine", "adjacent distance"]
    assert list(lines[0]) == [*first, *similar, "original cosine", "original distance"]
    assert list(lines[-1]) == ["step", "stage", "loss", "target", "gradient", *similar]
    assert lines[0]["loss"] == pytest.approx(0.5 * lines[0]["target"] + lines[0]["output"] + lines[0]["features"], rel=1e-5)
    assert (tmp_path / "new" / "log.png").read_bytes().startswith(b"\x89PNG")


def test_without_tqdm_and_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(steps=1, train="fusions")
    run(built(DIT), DIT, stage, progress=True)
    assert "1/1" in capsys.readouterr().err
    for name in ("tqdm", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    run(built(DIT), DIT, stage, progress=True, log=tmp_path / "log.jsonl")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(cachekit.ConfigError, match="pip install matplotlib"):
        run(built(DIT), DIT, stage, log=tmp_path / "log.jsonl", plot=tmp_path / "log.png")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_everything_else_is_as_it_was(fails: bool, wrapped: bool) -> None:
    model = built(DIT).to(torch.bfloat16)
    model.transformer_blocks[1].train()
    model.pos_embed.proj.weight.requires_grad_(False)
    if wrapped:
        cachekit.wrap(model, "every-2", segments="skip-1")
    facts = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    flags = [(parameter.requires_grad, parameter.dtype, id(parameter)) for parameter in model.parameters()]
    generator = torch.get_rng_state()
    seen: set[tuple[torch.dtype, bool]] = set()

    def data(step: int) -> tuple[dict[str, Any], Tensor]:
        if fails and step == 1:
            raise Stopped
        seen.update((parameter.dtype, parameter.requires_grad) for parameter in model.parameters())
        inputs = DIT.inputs(500, dtype=torch.bfloat16, seed=step)
        return inputs, torch.zeros_like(inputs["hidden_states"])

    before = state_of(model)
    with torch.no_grad():
        try:
            cachekit.retrofit(model, data, stages=[Stage(steps=3, train="all", lr=0.1)], progress=False)
        except Stopped:
            assert fails
        assert not torch.is_grad_enabled()
    assert seen == {(torch.float32, True), (torch.float32, False)}
    assert facts == [(module.training, len(module._forward_hooks)) for module in model.modules()]
    assert flags == [(parameter.requires_grad, parameter.dtype, id(parameter)) for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not same(state_of(model), before)
    if wrapped:
        assert not model.cachekit.stats.records
        with torch.no_grad():
            for t in (900, 800):
                model(**DIT.inputs(t, dtype=torch.bfloat16))
        assert sum(model.cachekit.stats.records[-1].recomputed) == 2


def test_compiled_blocks_train_alike() -> None:
    stage = Stage(steps=3, train="all", distill=Distillation())
    expected = run(built(DIT, "paper"), DIT, stage)
    model = built(DIT, "paper")
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    found = run(model, DIT, stage)
    assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected)


def test_checkpointed_blocks_train_alike() -> None:
    stage = Stage(steps=2, train="all", distill=Distillation())
    expected = run(built(DIT, "paper"), DIT, stage)
    model = built(DIT, "paper")
    model.enable_gradient_checkpointing()
    found = run(model, DIT, stage)
    assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-6) for key in expected)


FUSIONS = Stage(steps=1, train="fusions")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": []}, r"stages=\[cachekit.Stage"),
        ({"stages": "paper"}, r"stages=\[cachekit.Stage"),
        ({"stages": [FUSIONS, "all"]}, r"stages=\[cachekit.Stage"),
        ({"ema": 1.0}, "ema"),
        ({"clip": 0}, "clip"),
        ({"save_every": 0}, "save_every"),
        ({"log_every": 0}, "log_every"),
        ({"seed": -1}, "seed"),
        ({"plot": "log.png"}, "give both"),
        ({"data": None}, "give a function of the step"),
        ({"data": lambda step: DIT.inputs(500)}, r"data\(0\) returned dict; return \(inputs, target\)"),
        ({"data": lambda step: (DIT.inputs(500),)}, r"returned dict; return \(inputs, target\)"),
        ({"data": lambda step: (DIT.inputs(500)["hidden_states"], None)}, r"return \(inputs, target\)"),
        ({"data": lambda step: (DIT.inputs(500), torch.zeros(2, 9, 8, 8))}, "of fewer channels"),
        ({"data": lambda step: (DIT.inputs(500), torch.zeros(1, 4, 8, 8))}, "of fewer channels"),
        ({"data": lambda step: (DIT.inputs(500), torch.zeros(4, 8, 8))}, "of fewer channels"),
    ],
)
def test_mistakes_are_refused(options: dict[str, Any], says: str) -> None:
    model = built(DIT)
    before = state_of(model)
    with pytest.raises(cachekit.ConfigError, match=says):
        cachekit.retrofit(model, **{"data": data_of(DIT), "stages": [FUSIONS], "progress": False, **options})
    assert same(state_of(model), before)


@pytest.mark.parametrize("wrong", [{}, {"steps": 0}, {"steps": 5, "train": "deep"}, {"steps": 5, "lr": -1}, {"step": 5}])
def test_a_stage_says_what_it_needs(wrong: dict[str, Any]) -> None:
    with pytest.raises(cachekit.ConfigError, match=r"write cachekit.Stage\(steps=1000"):
        Stage(**{"train": "all", **wrong})
    with pytest.raises(cachekit.ConfigError, match="it takes target=, output=, features="):
        Distillation(output=-1)


def test_models_that_cannot_be_trained() -> None:
    with pytest.raises(cachekit.ModelError, match=r"cachekit.add_long_skips\(model\) first"):
        run(DIT.build(), DIT, FUSIONS)
    with pytest.raises(cachekit.ModelError, match=r"pipe\.transformer"):
        run("model", DIT, FUSIONS)
    model = built(DIT).requires_grad_(False)
    run(model, DIT, FUSIONS)
    with pytest.raises(cachekit.ModelError, match=r"model.requires_grad_\(True\) first"):
        run(model, DIT, FUSIONS, Stage(steps=1, train="all"))
    with pytest.raises(cachekit.ModelError, match="lower lr"):
        run(built(DIT, "paper"), DIT, Stage(steps=4, train="all", lr=1e20))


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
