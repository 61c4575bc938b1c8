"""The comparison's second table: how good samples are, with the intervals."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from cachekit.demo.bootstrap import LEAST_SAMPLES, Interval
from cachekit.demo.measure import Measured
from cachekit.demo.report import Floors


def quality_table(solver: str, found: Sequence[Measured], real: Floors, n: int, plain: Measured | None) -> Table:
    """One solver's rows.

    Args:
        solver: as the title shows it.
        found: the uncached row first.
        real: mean and spread of the distance of n real samples, for each kind of features.
        n: number of samples in each row.
        plain: the uncached row of the model that speed-ups are given against as well.
    """
    made = Table(title=f"{solver}: quality", caption=Text(_caption(found, real, n)), caption_justify="left")
    against = [] if plain is None else ["against plain"]
    distances = [title for name in real for title in (f"Frechet, {name}", "to uncached")]
    for k, column in enumerate(["", "speed-up", *against, *distances, "PSNR", "SSIM"]):
        made.add_column(column, justify="right" if k else "left", no_wrap=True)
    kind = "uncached"
    for each in found:
        if each.row.kind != kind:
            made.add_section()
            kind = each.row.kind
        quality = each.quality
        cells = [cell for name in real for cell in (figure(quality.frechet.get(name), 3), share(quality.change.get(name)))]
        speeds = [first.time / each.time for first in (found[0], *([] if plain is None else [plain]))]
        made.add_row(
            each.row.label, *(f"{speed:.2f}x" for speed in speeds), *cells, figure(quality.psnr, 1), figure(quality.ssim, 3)
        )
    return made


def figure(found: Interval | None, digits: int) -> str:
    """A figure with the ends of its interval."""
    if found is None:
        return ""
    ends = "" if not found.known else f" [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return f"{found.value:.{digits}f}{ends}"


def share(found: Interval | None) -> str:
    """A relative change in per cent with the ends of its interval."""
    if found is None:
        return ""
    ends = "" if not found.known else f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"{100 * found.value:+.1f}{ends} %"


def _caption(found: Sequence[Measured], real: Floors, n: int) -> str:
    lines = [f"{n} samples. PSNR and SSIM: to the same model uncached, mean over samples."]
    if n >= LEAST_SAMPLES:
        lines.append("In brackets: 95 % bootstrap intervals; the noise is paired, and real data are taken as they are.")
    else:
        lines.append(f"No intervals: they need {LEAST_SAMPLES} samples; raise --seeds or --images.")
    if not any(each.quality.ssim for each in found):
        lines.append("PSNR, SSIM and distances in EfficientNet's features: pip install 'cachekit-dit[metrics]'.")
    lines += [f"{name}: {n} real samples themselves give {mean:.3f} ± {spread:.3f}." for name, (mean, spread) in real.items()]
    return "\n".join(lines)
