"""The command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cachekit.demo.compare import compare as run_comparison
from cachekit.demo.rows import POLICIES
from cachekit.demo.target import load_target
from cachekit.errors import CachekitError
from cachekit.spec import known_policies, summary, usage

# A table that is cut off says nothing; where nobody looks at a terminal, there is no width to keep to.
WIDTH = 184

app = typer.Typer(help="Skip parts of a diffusion transformer per denoising step.", add_completion=False, no_args_is_help=True)


def _console() -> Console:
    return Console(width=WIDTH) if not Console().is_terminal or Console().width < WIDTH else Console()


@app.callback()
def main() -> None:
    """Skip parts of a diffusion transformer per denoising step."""


@app.command()
def compare(
    target: Annotated[
        str | None,
        typer.Argument(help="package.module:factory, returning (model, sample) or a Target; the shipped DiT if left out."),
    ] = None,
    policies: Annotated[
        list[str] | None, typer.Option("--policies", "-p", help="POLICY[@SEGMENTS][/REUSE]; several: repeat it, or put commas.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of noise seeds.")] = 5,
    images: Annotated[int, typer.Option(min=1, help="Images per seed, for the shipped model.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for compare.json and the pictures.")] = Path("cachekit-compare"),
) -> None:
    """Sample a model uncached, with fewer steps and under several policies, and show what each costs and gains."""
    console = _console()
    chosen = [text for given in policies or POLICIES for text in given.split(",")]
    try:
        if target is None:
            from cachekit.demo.fashion import target as shipped

            made = shipped(images)
        else:
            made = load_target(target)
        run_comparison(made, chosen, seeds, out, console)
    except CachekitError as error:
        Console(stderr=True).print(f"cachekit: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from error


@app.command()
def policies() -> None:
    """List every policy that a spec string may name, those of other packages too."""
    table = Table("spec", "what it does", title="Policies; join them with | and &, and override segments= and reuse= as you like")
    for name, found in sorted(known_policies().items(), key=lambda item: item[0].lower()):
        table.add_row(Text(usage(name, found), no_wrap=True), Text(summary(name, found)))
    _console().print(table)
