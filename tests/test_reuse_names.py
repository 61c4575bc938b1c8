"""Names of reuses: what their specs parse to, which numbers are refused, and those that other packages bring."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cachekit import ConfigError, Forecast, Reuse
from cachekit.policies.reuses import (
    REUSES,
    Bdf,
    Chebyshev,
    FlowLogSnr,
    Frequencies,
    Hermite,
    LogSnr,
    Mix,
    Scale,
    TaylorSeer,
    Tokens,
)
from cachekit.reuse import parse_reuse

SPECS: list[tuple[str, Reuse]] = [
    ("output", Forecast()),
    ("residual", Forecast(beta=1.0)),
    ("taylorseer-2", TaylorSeer(2)),
    ("taylorseer", TaylorSeer(1)),
    ("hermite-3-0.7", Hermite(3, 0.7)),
    ("hermite", Hermite(2, 0.5, axis="grid")),
    ("chebyshev-3-4", Chebyshev(3, 4)),
    ("bdf2", Bdf(2)),
    ("bdf-1", Bdf(1)),
    ("grid-taylorseer-2", TaylorSeer(2, axis="grid")),
    ("residual-chebyshev-1", Chebyshev(1, beta=1.0)),
    ("residual-grid-bdf2", Bdf(2, beta=1.0, axis="grid")),
    ("taylor-0", Forecast()),
    ("taylor-2.25", Forecast(2, blend=0.25)),
    ("grid-residual-taylor-1", Forecast(1, beta=1.0, axis="grid")),
    ("residual-grid-taylor-0.5", Forecast(blend=0.5, beta=1.0, axis="grid")),
    ("mix", Mix(0.0, 1.0)),
    ("mix-0.1-0.6", Mix(0.1, 0.6)),
    ("tokens-0.07", Tokens(0.07)),
    ("frequencies", Frequencies(1.1, 1.1)),
    ("frequencies-1.2-1", Frequencies(1.2, 1.0)),
]


@pytest.mark.parametrize(("spec", "reuse"), SPECS, ids=[spec for spec, _ in SPECS])
def test_specs(spec: str, reuse: Reuse) -> None:
    assert parse_reuse(spec) == reuse
    assert parse_reuse(reuse) is reuse


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hermit-2", r"known: bdf-ORDER, chebyshev-.*, frequencies-LOW-HIGH, hermite-.*, tokens-SHARE; write 'output'"),
        ("bdf-3", "does not fit bdf-ORDER.*less than or equal to 2"),
        ("hermite-2-0", "greater than 0"),
        ("chebyshev-2-1.5", "valid integer"),
        ("taylorseer-1-2-3", "does not fit taylorseer-ORDER"),
        ("taylor", "does not fit taylor-K"),
        ("tokens-0", "greater than 0"),
        ("tokens-2", "less than or equal to 1"),
        ("grid-grid-taylor-1", "unknown reuse"),
        ("grid-", "unknown reuse"),
    ],
)
def test_unreadable_specs(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        parse_reuse(spec)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scale((900.0, 600.0), (1.0,)),
        lambda: Scale((600.0, 900.0), (1.0, 1.0)),
        lambda: Scale((), ()),
        lambda: Scale((900.0,), (0.0,)),
        lambda: LogSnr(()),
        lambda: FlowLogSnr(margin=0.5),
        lambda: Bdf(3),
        lambda: Bdf(2, blend=0.5),
        lambda: Forecast(1, blend=1.0),
        lambda: Hermite(2, -1.0),
        lambda: Chebyshev(2, -1),
        lambda: Forecast(ordr=2),  # type: ignore[call-arg]
        lambda: Hermite(2, axes="t"),  # type: ignore[call-arg]
        lambda: LogSnr((0.9, 0.1), margin=0.1),  # type: ignore[call-arg]
        lambda: Scale((900.0,), (1.0,), axis="t"),  # type: ignore[call-arg]
    ],
)
def test_numbers_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"ratios for|must fall|Input should be|at least 1 item|Unexpected keyword|leave blend"):
        make()


ENTRY_POINTS = """
[cachekit.reuses]
tangent = cachekit.policies.reuses:Bdf
fixed-scale = naive_reuse:fixed
no-reuse = builtins:float
broken = nowhere_to_be_found:reuse
"""
FIXED = """
from cachekit.policies.reuses import Scale


def fixed(ratio):
    return Scale((1000, 0), (1, ratio))
"""


def test_reuses_of_other_packages(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by name like policies; one that can't be loaded, or makes no reuse, is named and breaks nothing else."""
    info = tmp_path / "others-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    (tmp_path / "naive_reuse.py").write_text(FIXED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert parse_reuse("residual-tangent-1") == Bdf(1, beta=1.0)
    assert parse_reuse("fixed-scale-0.5") == Scale((1000.0, 0.0), (1.0, 0.5))
    assert parse_reuse("taylor-1") == Forecast(1)
    with pytest.raises(ConfigError, match=r"'fixed-scale-0.5' has no axis to set; write 'fixed-scale-0.5' alone"):
        parse_reuse("residual-grid-fixed-scale-0.5")
    with pytest.raises(ConfigError, match=r"'broken'.*nowhere_to_be_found"):
        parse_reuse("broken-2")
    with pytest.raises(ConfigError, match="unknown reuse"):
        parse_reuse("no-reuse-2")
    with pytest.raises(ConfigError, match=r"broken \(can't be loaded\), chebyshev-ORDER-EXTRA, fixed-scale-RATIO"):
        parse_reuse("what-2")


def test_every_name_is_tried_above() -> None:
    tried = {re.sub(r"^(residual-)?(grid-)?(?=.)", "", re.sub(r"-?[\d.-]*$", "", spec)) for spec, _ in SPECS}
    assert set(REUSES) <= tried
