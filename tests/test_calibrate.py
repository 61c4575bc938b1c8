"""Calibrations: every figure against a loop over values that forward hooks caught, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from calibrating import STEPS, grid, sampling, scheduler, small
from torch import Tensor
from zoo import PIXART

import cachekit
import cachekit.demo.fashion
import cachekit.policies
from cachekit import Calibration, Forecast
from cachekit.calibration import SiteRecord
from cachekit.error_model import ErrorModel
from cachekit.policies.planned import planned
from cachekit.policies.smoothcache import greedy, smoothcache


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


@pytest.fixture(scope="module")
def calibration(model: Any) -> Calibration:
    return cachekit.calibrate(model, sampling(model), runs=2, sites=("model", "middle", "attn", "mlp"), progress=False)


def caught(model: Any, path: str, run: int = 0, *, entering: bool = False) -> list[Tensor]:
    """What a module returned (or took in) at each step of an uncached run."""
    found: list[Tensor] = []
    taken = model.get_submodule(path).register_forward_pre_hook if entering else model.get_submodule(path).register_forward_hook

    def note(module: Any, args: Any, kwargs: Any, *result: Any) -> None:
        value = next(iter([*args, *kwargs.values()])) if entering else result[0]
        found.append(getattr(value, "sample", value).double())

    handle = taken(note, with_kwargs=True)
    try:
        sampling(model)(run)
    finally:
        handle.remove()
    return found


def relative(sample: Tensor, full: Tensor) -> float:
    return float((sample - full).double().norm() / full.double().norm())


def test_it_leaves_the_model_as_it_was(model: Any, calibration: Calibration) -> None:
    assert "cachekit" not in model.__dict__ and "forward" not in model.__dict__
    assert calibration.timesteps == grid() and calibration.runs == (0, 1)


def test_inner_products_of_values(model: Any, calibration: Calibration) -> None:
    """Of the middle, which ends with block 4, over both runs."""
    wanted = np.zeros((STEPS, STEPS))
    for run in (0, 1):
        values = caught(model, "transformer_blocks.4", run)
        wanted += [[float((a * b).sum()) / 2 for b in values] for a in values]
    assert np.allclose(calibration.site("middle").gram, wanted, rtol=1e-9)


def test_smoothcaches_curve(model: Any, calibration: Calibration) -> None:
    """The mean over all attentions and runs of Σ|held - true| / Σ|true|."""
    for name, path in (("attn", "attn1"), ("mlp", "ff")):
        curve = calibration.site(name).lookahead
        for k in (1, 2, 3):
            for i in range(STEPS):
                if i + k >= STEPS:
                    assert curve[k - 1][i] is None
                    continue
                errors = []
                for run in (0, 1):
                    for block in range(6):
                        values = caught_once(model, f"transformer_blocks.{block}.{path}", run)
                        errors.append(float((values[i] - values[i + k]).abs().sum() / values[i + k].abs().sum()))
                assert curve[k - 1][i] == pytest.approx(np.mean(errors), rel=1e-9)


_ONCE: dict[tuple[int, str, int], list[Tensor]] = {}


def caught_once(model: Any, path: str, run: int) -> list[Tensor]:
    key = id(model), path, run
    if key not in _ONCE:
        _ONCE[key] = caught(model, path, run)
    return _ONCE[key]


def test_magcaches_ratios(model: Any, calibration: Calibration) -> None:
    """Norms over the width of the stack's residual, their ratio's mean over tokens, images and runs."""
    wanted = np.zeros(STEPS)
    for run in (0, 1):
        ends, starts = caught(model, "transformer_blocks.5", run), caught(model, "transformer_blocks.0", run, entering=True)
        norms = [(end - start).norm(dim=-1) for end, start in zip(ends, starts, strict=True)]
        wanted += [1.0 / 2, *(float((now / then).mean()) / 2 for then, now in pairwise(norms))]
    # Residuals are stored in single precision, as differences of tensors of size 1: off by 1e-7 each.
    assert np.allclose(calibration.ratios, wanted, rtol=1e-4)


def test_teacaches_pairs_and_polynomial(model: Any, calibration: Calibration) -> None:
    """Changes of what enters the first attention, and of the prediction."""
    pairs: tuple[list[float], list[float]] = ([], [])
    for run in (0, 1):
        entering, leaving = caught(model, "transformer_blocks.0.attn1", run, entering=True), caught(model, "", run)
        for found, values in zip(pairs, (entering, leaving), strict=True):
            found += [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(values)]
    assert np.allclose(calibration.input_changes, pairs[0], rtol=1e-6)
    assert np.allclose(calibration.output_changes, pairs[1], rtol=1e-6)
    assert calibration.change_polynomial(2) == pytest.approx(np.polyfit(*pairs, 2), rel=1e-3)
    assert calibration.threshold("input", 50) == pytest.approx(np.median(pairs[0]), rel=1e-6)


def test_percentiles_of_signals(model: Any, calibration: Calibration) -> None:
    """``change`` from step to step, as the policy of that name sees it: of the first block's residual."""
    seen = []
    for i in range(1, STEPS):
        steps = []
        for run in (0, 1):
            ends, starts = (
                caught_once(model, "transformer_blocks.0", run),
                caught(model, "transformer_blocks.0", run, entering=True),
            )
            # One decision for the batch follows the sample that changes most.
            residuals = [end - start for end, start in zip(ends, starts, strict=True)]
            then, now = residuals[i - 1], residuals[i]
            steps.append(max(float((now[g] - then[g]).abs().mean() / then[g].abs().mean()) for g in range(2)))
        seen.append(np.mean(steps))
    for percentile in (0, 25, 100):
        assert calibration.threshold("change", percentile) == pytest.approx(np.percentile(seen, percentile), rel=1e-4)


def test_the_percentile_of_teacache_is_of_its_estimate(model: Any, calibration: Calibration) -> None:
    """Of what the fitted polynomial makes of each change of what enters the first attention: by hand, term by term."""
    estimates = []
    for run in (0, 1):
        entering = caught(model, "transformer_blocks.0.attn1", run, entering=True)
        for then, now in pairwise(entering):
            d = float((now - then).abs().mean() / then.abs().mean())
            terms = [c * d**power for power, c in enumerate(reversed(calibration.change_polynomial()))]
            estimates.append(max(0.0, sum(terms)))
    for percentile in (0, 40, 100):
        # A polynomial of degree 4 that is fitted to 14 points: the changes' single precision comes out enlarged.
        expected = pytest.approx(np.percentile(estimates, percentile), rel=1e-3, abs=1e-6)
        assert calibration.threshold("estimate", percentile) == expected
    assert calibration.threshold("estimate", 100) != pytest.approx(calibration.threshold("input", 100), rel=0.01)


def test_an_estimate_below_zero_counts_as_zero(calibration: Calibration) -> None:
    """Where the fit dips under zero, a threshold can't follow it there."""
    changed = {"input_changes": tuple(float(d) for d in range(6)), "output_changes": (0.1, -1.0, -1.0, 0.5, 1.0, 1.0)}
    dipping = calibration.model_copy(update=changed)
    assert np.polyval(dipping.change_polynomial(), 1.0) < 0
    assert dipping.threshold("estimate", 0) == 0.0 < dipping.threshold("estimate", 90)


def test_the_percentile_of_first_block_needs_the_first_blocks_change(model: Any, calibration: Calibration, tmp_path: Path) -> None:
    """From whichever site begins with the second block; where none does it is refused."""
    other = calibration.site("middle").model_copy(update={"change": (None, *(0.5,) * (STEPS - 1))})
    behind = other.model_copy(update={"segments": (other.segments[0].model_copy(update={"start": 2}),)})
    calibration.model_copy(update={"sites": {"(2, -1)": behind, "skip-1": other}}).save(tmp_path / "c.json")
    cachekit.wrap(model, f"first-block-percentile-30:{tmp_path / 'c.json'}")
    (site,) = model.cachekit._engine.sites
    cachekit.unwrap(model)
    assert (site.segment, site.policy) == (cachekit.Segment(1), cachekit.policies.change(0.5, pooled=True))
    calibration.model_copy(update={"sites": {"(2, -1)": behind, "model": calibration.site("model")}}).save(tmp_path / "c.json")
    with pytest.raises(cachekit.ConfigError, match=r"did not see the first block's change.*sites=\('middle',\)"):
        cachekit.wrap(model, f"first-block-percentile-30:{tmp_path / 'c.json'}")
    with pytest.raises(cachekit.ConfigError, match=r"give one of 0 \.\.\. 100"):
        cachekit.wrap(model, f"teacache-percentile-101:{tmp_path / 'c.json'}")


def test_a_higher_percentile_reuses_no_less(model: Any, calibration: Calibration, tmp_path: Path) -> None:
    """The higher the percentile, the more, from the smallest change of all to the largest."""
    calibration.save(tmp_path / "c.json")
    for name in ("teacache", "first-block"):
        reused = []
        for percentile in (0, 50, 100):
            cachekit.wrap(model, f"{name}-percentile-{percentile}:{tmp_path / 'c.json'}")
            with model.cachekit.session(steps=STEPS):
                sampling(model)(0)
            reused.append(sum(not all(record.recomputed) for record in model.cachekit.stats.records))
            cachekit.unwrap(model)
        assert reused == sorted(reused) and reused[0] < reused[2]


@pytest.mark.parametrize("site", ("model", "middle"))
@pytest.mark.parametrize("order", (0, 1, 2))
def test_what_one_reused_step_costs(model: Any, calibration: Calibration, site: str, order: int) -> None:
    """As each probe, of as high an order as there are values for: run here by a schedule of all other steps, and foretold."""
    full = sampling(model)(0)
    record, reuse = calibration.site(site), Forecast(order=order, bound=12.0, axis="grid")
    told = ErrorModel(record, reuse, grid())
    for i in range(1, STEPS):
        others = tuple(k for k in range(STEPS) if k != i)
        cachekit.wrap(model, planned(others, grid()), segments=site, reuse=reuse)
        error = relative(sampling(model)(0), full)
        cachekit.unwrap(model)
        at = min(order, i - 1) * STEPS + i
        assert record.response[at][at] ** 0.5 == pytest.approx(error, rel=1e-6)
        # Inner products of values of single precision are off by 1e-7 of them, and what is left at order 2 is 1e-2 of a value.
        assert told.predict(others) == pytest.approx(error, rel=1e-3)
        assert told.cost(tuple(range(i - 1, -1, -1)), i) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("reuse", [Forecast(axis="grid"), Forecast(order=1, axis="grid"), Forecast(order=2, axis="t")])
def test_errors_of_values_are_foretold_exactly(model: Any, calibration: Calibration, reuse: Forecast) -> None:
    """With the values of two runs, |Σ w_j z_j - z_i| / |z_i| follows from their inner products."""
    told = ErrorModel(calibration.site("middle"), reuse, grid())
    both = [caught(model, "transformer_blocks.4", run) for run in (0, 1)]
    values = [torch.cat([a.flatten(), b.flatten()]) for a, b in zip(*both, strict=True)]
    for last, i in (((0,), 2), ((3, 1), 4), ((4, 2, 1), 6)):
        used = last[: reuse.length]
        times = [grid()[k] if reuse.axis == "t" else float(k) for k in (*used, i)]
        weights = reuse.weights(times[:-1], times[-1])
        forecast = torch.stack([weight * values[k] for weight, k in zip(weights, used, strict=False)]).sum(0)
        assert told.local(last, i) == pytest.approx(relative(forecast, values[i]), rel=1e-5)


def test_smoothcache_is_greedy() -> None:
    """From each recompute on, as far as the curve stays under alpha; by hand."""
    curve = ((0.05, 0.2, 0.05, 0.05, 0.05, None), (0.09, 0.3, 0.09, 0.2, None, None), (0.2, 0.4, 0.09, None, None, None))
    assert greedy(curve, 0.1) == (0, 3, 5)
    assert greedy(curve, 0.01) == (0, 1, 2, 3, 4, 5)
    assert greedy(curve, 1.0) == (0, 4)


def naive_schedule(curve: Any, alpha: float) -> list[int]:
    """The steps that are full, one after the other: each is, unless every error since the last full one stayed under alpha."""
    full, last = [], 0
    for i in range(STEPS):
        gap = i - last
        if i == 0 or gap > 3 or curve[gap - 1][last] >= alpha:
            full.append(i)
            last = i
    return full


def pixart_sampling(model: Any) -> Any:
    """As ``sampling``, of two samples with a text of their own."""
    conditioning = PIXART.conditioning()

    def sample(run: int) -> Tensor:
        made = scheduler()
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(run))
        with torch.no_grad():
            for t in made.timesteps:
                noise = model(x, timestep=t.expand(2), **conditioning)[0][:, :4]
                x = made.step(noise, t, x).prev_sample
        return x

    return sample


DIT_KINDS, PIXART_KINDS = {"attn": "attn1", "mlp": "ff"}, {"attn": "attn1", "cross_attn": "attn2", "mlp": "ff"}


@pytest.mark.parametrize("kinds, of", ((DIT_KINDS, small), (PIXART_KINDS, PIXART.build)), ids=("DiT", "PixArt"))
def test_smoothcache_holds_each_kind_by_its_own_curve(kinds: dict[str, str], of: Any, tmp_path: Path) -> None:
    """Against a loop that replaces modules' outputs by the last computed ones, on a schedule of its own; bit for bit."""
    model = of()
    sample = sampling(model) if of is small else pixart_sampling(model)
    calibration = cachekit.calibrate(model, sample, runs=1, sites=tuple(kinds), probes=(1,), progress=False)
    alpha = float(np.median([e for row in calibration.site("attn").lookahead for e in row if e is not None]))
    schedules = {path: naive_schedule(calibration.site(name).lookahead, alpha) for name, path in kinds.items()}
    assert any(len(schedule) < STEPS for schedule in schedules.values())
    calibration.save(tmp_path / "c.json")
    cachekit.wrap(model, f"smoothcache-{alpha!r}:{tmp_path / 'c.json'}")
    found = sample(5)
    cachekit.unwrap(model)
    handles, calls, stored = [], dict[str, int](), dict[str, Tensor]()
    for block in range(6):
        for kind, schedule in schedules.items():
            path = f"transformer_blocks.{block}.{kind}"

            def hold(module: Any, args: Any, result: Tensor, path: str = path, schedule: list[int] = schedule) -> Tensor:
                i = calls[path] = calls.get(path, -1) + 1
                if i in schedule:
                    stored[path] = result
                return stored[path]

            handles.append(model.get_submodule(path).register_forward_hook(hold))
    expected = sample(5)
    for handle in handles:
        handle.remove()
    assert torch.equal(found, expected)


def test_files(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    with pytest.raises(cachekit.ConfigError, match="there is no calibration to read"):
        Calibration.load(tmp_path / "other.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(cachekit.ConfigError, match="is no calibration"):
        Calibration.load(tmp_path / "bad.json")
    with pytest.raises(cachekit.ConfigError) as told:
        cachekit.Plan.load(tmp_path / "c.json")
    assert "format: Input should be 'cachekit plan 1', not 'cachekit calibration 1'" in str(told.value)
    assert "\n" not in str(told.value), "one line, though every field is another kind of file's"


@pytest.mark.parametrize(("probes", "each"), [((0, 1, 2), 3 * (STEPS - 2)), ((1,), STEPS - 1), ((0, 2), 2 * STEPS - 3)])
def test_no_generation_is_run_twice(model: Any, probes: tuple[int, ...], each: int) -> None:
    """At the second step there is one value, at the third there are two: orders that are the same there are one probe."""
    runs = list[int]()

    def sample(run: int) -> Tensor:
        runs.append(run)
        return sampling(model)(run)

    cachekit.calibrate(model, sample, runs=2, sites=("model",), probes=probes, progress=False)
    assert len(runs) == 2 * (1 + 1) + each and runs.count(1) == 2


def test_fewer_probes(model: Any, calibration: Calibration) -> None:
    """What one order finds is what all three found for it; a file that does not name its probes has the one of order 1."""
    one = cachekit.calibrate(model, sampling(model), runs=2, sites=("middle",), probes=(1,), progress=False).site("middle")
    three, first = np.array(calibration.site("middle").response), range(STEPS + 2, 2 * STEPS)
    # At the second step there is one value, which order 0 holds as order 1 does.
    at = [0, 1, *first]
    np.testing.assert_allclose(np.array(one.response), three[np.ix_(at, at)], rtol=1e-9, atol=1e-15)
    assert one.gram == calibration.site("middle").gram
    written = {key: value for key, value in one.model_dump().items() if key != "probes"}
    assert SiteRecord.model_validate(written) == one


def test_fitted_policies_by_name(model: Any, calibration: Calibration, tmp_path: Path) -> None:
    """They equal the same policies with the calibration's numbers written out."""
    file = tmp_path / "c.json"
    calibration.save(file)
    written = {
        f"magcache-0.1:{file}": cachekit.policies.magcache(calibration.ratios, grid(), 0.1),
        f"teacache-0.3:{file}": cachekit.policies.teacache(0.3, coefficients=calibration.change_polynomial()),
        f"change-percentile-60:{file}": cachekit.policies.change(calibration.threshold("change", 60)),
        f"teacache-percentile-60:{file}": cachekit.policies.teacache(
            calibration.threshold("estimate", 60), coefficients=calibration.change_polynomial()
        ),
        f"first-block-percentile-60:{file}": cachekit.policies.first_block(calibration.threshold("change", 60)),
        f"smoothcache-0.2:{file}": smoothcache(calibration, 0.2),
    }
    for spec, policy in written.items():
        records, samples = [], []
        for each in (spec, policy):
            cachekit.wrap(model, each)
            with model.cachekit.session(steps=STEPS):
                samples.append(sampling(model)(3))
            records.append([(record.recomputed, record.modules) for record in model.cachekit.stats.records])
            cachekit.unwrap(model)
        assert records[0] == records[1] and torch.equal(*samples)


def test_what_is_refused(model: Any, calibration: Calibration, tmp_path: Path) -> None:
    runs = iter(range(100))
    with pytest.raises(cachekit.ConfigError, match="start each from the noise of its run alone"):
        cachekit.calibrate(model, lambda run: sampling(model)(next(runs)), runs=1, progress=False)
    for bad in cast(Any, ((), (1, 1), (3,), 1)):
        with pytest.raises(cachekit.ConfigError, match="give some of the orders 0, 1, 2, each once"):
            cachekit.calibrate(model, sampling(model), runs=1, probes=bad, progress=False)
    with pytest.raises(cachekit.ConfigError, match="makes a single step"):
        cachekit.calibrate(model, sampling(model, 1), runs=1, progress=False)
    for nothing, says in (("model", r"sites=\('model',\)"), ((), "give at least one")):
        with pytest.raises(cachekit.ConfigError, match=says):
            cachekit.calibrate(model, sampling(model), runs=1, sites=nothing, progress=False)
    with pytest.raises(cachekit.ConfigError, match="had different timesteps"):
        cachekit.calibrate(model, lambda run: sampling(model, 4 + run)(run), runs=2, progress=False)
    with pytest.raises(cachekit.ConfigError, match="return the final sample as a tensor"):
        cachekit.calibrate(model, lambda run: None, runs=1, progress=False)
    with pytest.raises(cachekit.ConfigError, match="give how many there are"):
        cachekit.calibrate(model, sampling(model), runs=0, progress=False)
    with pytest.raises(cachekit.ConfigError, match="give one of 0"):
        calibration.threshold("change", 101)
    with pytest.raises(cachekit.ConfigError, match="was not calibrated"):
        calibration.threshold("change", 10, site="all")
    other = cachekit.demo.fashion.new_model()
    calibration.save(tmp_path / "c.json")
    with pytest.raises(cachekit.ConfigError, match="made for another model"):
        cachekit.wrap(other, f"smoothcache-0.1:{tmp_path / 'c.json'}")
    assert "cachekit" not in model.__dict__
