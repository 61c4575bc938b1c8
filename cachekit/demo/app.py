"""The command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cachekit.demo.compare import FIRST_SEED, Entry, compare_all
from cachekit.demo.kept import Kept
from cachekit.demo.rows import BESIDE, POLICIES, rows_of, split_policies
from cachekit.demo.shipped import SHIPPED, find_target
from cachekit.errors import CachekitError
from cachekit.policies.calibrated import CALIBRATED
from cachekit.spec import file_usage, known_policies, summary, usage

# A table that is cut off says nothing; where nobody looks at a terminal, there is no width to keep to.
WIDTH = 184

app = typer.Typer(
    help="Skip parts of a diffusion transformer per denoising step.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _console() -> Console:
    return Console(width=WIDTH) if not Console().is_terminal or Console().width < WIDTH else Console()


@app.callback()
def main() -> None:
    """Skip parts of a diffusion transformer per denoising step."""


@app.command()
def compare(
    target: Annotated[
        str | None,
        typer.Argument(
            help="package.module:factory, returning (model, sample) or a Target; if left out, the shipped Skip-DiT and DiT."
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            help=f"A target, {', '.join(SHIPPED)} among them, NAME:FILE with other weights; several side by side: repeat it. "
            "Speed-ups are given against the last one as well.",
        ),
    ] = None,
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policies",
            "-p",
            help="[TARGET=]POLICY[@SEGMENTS][/REUSE]; several: repeat it, or put commas. With TARGET= for that target alone.",
        ),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Steps of the full run of the first solver, each in a table of its own: repeat it."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of noise seeds.")] = 5,
    images: Annotated[int, typer.Option(min=1, help="Images or clips per seed, for the shipped models.")] = 4,
    fine: Annotated[
        int | None,
        typer.Option(min=0, help="On how many seeds the fine solution is computed; all if left out, two without a target."),
    ] = None,
    first_seed: Annotated[int, typer.Option(min=0, help="The first noise seed.")] = FIRST_SEED,
    keep: Annotated[
        Path | None,
        typer.Option(help="Folder for finished runs, from which a comparison goes on that was stopped, or that others share."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for compare.json and the pictures.")] = Path("cachekit-compare"),
) -> None:
    """Sample models uncached, with fewer steps and under several policies, and show what each costs and gains."""
    console = _console()
    names = [*([] if target is None else [target]), *(targets or [])]
    chosen = [text for given in policies or () for text in split_policies(given)]
    try:
        entries = _entries(names, chosen or POLICIES, images) if names else _shipped(chosen, images)
        # Half a minute of a command that is to be over in two.
        fine = fine if names or fine is not None else 2
        compare_all(entries, seeds, out, console, steps or (), fine, first_seed, Kept(keep, f"{images} a seed"))
    except CachekitError as error:
        Console(stderr=True).print(f"cachekit: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from error


def _entries(names: Sequence[str], policies: Sequence[str], images: int) -> list[Entry]:
    return [
        Entry(find_target(name, images), rows, name if len(names) > 1 else "")
        for name, rows in zip(names, rows_of(names, policies), strict=True)
    ]


def _shipped(policies: Sequence[str], images: int) -> list[Entry]:
    """The shipped Skip-DiT, and in short the plain DiT, which saves a minute of fewer steps and fine solutions."""
    full, beside = rows_of(["skip-dit", "plain"], policies) if policies else (POLICIES, BESIDE)
    plain = replace(find_target("plain", images), fine=None)
    return [Entry(find_target("skip-dit", images), full, "skip-dit"), Entry(plain, beside, "plain", fewer=False)]


@app.command()
def policies() -> None:
    """List every policy that a spec string may name, those of other packages too."""
    table = Table("spec", "what it does", title="Policies; join them with | and &, and override segments= and reuse= as you like")
    for name, found in sorted(known_policies().items(), key=lambda item: item[0].lower()):
        table.add_row(Text(usage(name, found), no_wrap=True), Text(summary(name, found)))
    for name, maker in CALIBRATED.items():
        table.add_row(Text(file_usage(name, maker), no_wrap=True), Text(summary(name, maker)))
    _console().print(table)
