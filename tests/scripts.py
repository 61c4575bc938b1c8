"""Run the scripts of training/ and benchmarks/ within the test's own process, which saves importing torch each time."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imported(monkeypatch: pytest.MonkeyPatch, folder: str, name: str) -> Any:
    """A script as a module; its folder is where it finds its neighbours, as when it is run."""
    monkeypatch.setattr(sys, "path", [str(ROOT / folder), *sys.path])
    return importlib.import_module(name)


def run(monkeypatch: pytest.MonkeyPatch, script: Any, *arguments: object) -> None:
    """Its command line."""
    monkeypatch.setattr(sys, "argv", [str(script.__file__), *map(str, arguments)])
    script.main()
