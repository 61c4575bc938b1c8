"""Entry point of the command line, which says what to install where the extra is missing."""

from __future__ import annotations

import sys

EXTRA = ("typer", "rich", "matplotlib", "safetensors", "diffusers")


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: a package of the [demo] extra is missing, or the command ended.
    """
    try:
        from cachekit.demo.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRA:
            raise
        sys.exit(f"cachekit: the command line needs the package {error.name!r}; install it with: pip install 'cachekit-dit[demo]'")
    app()
