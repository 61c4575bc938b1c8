"""``cachekit policies``: every name, how it is written, and what it does."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import Any

import pytest
from typer.testing import CliRunner

from cachekit.demo import app as commands
from cachekit.policies import POLICIES
from cachekit.policies.calibrated import CALIBRATED
from cachekit.spec import file_usage, summary, usage


def listed() -> str:
    result = CliRunner().invoke(commands.app, ["policies"], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def rows(output: str) -> dict[str, str]:
    """Usage and text of each row, put together again from the lines that it takes."""
    found: dict[str, str] = {}
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        if len(cells) == 2 and cells[0]:
            found[cells[0]] = cells[1]
        elif len(cells) == 2 and found:
            found[list(found)[-1]] += " " + cells[1]
    return found


def test_every_policy_is_listed_with_its_usage_and_its_first_paragraph() -> None:
    found = rows(listed())
    assert found.pop("spec") == "what it does"
    from_files = {file_usage(name, maker): summary(name, maker) for name, maker in CALIBRATED.items()}
    assert found == {usage(name, maker): summary(name, maker) for name, maker in POLICIES.items()} | from_files
    assert found["smoothcache-ALPHA:FILE"].startswith("SmoothCache") and "plan:FILE" in found
    assert found["every-N"].startswith("Recompute at steps 0, n, 2n")
    assert found["taylorseer-N-ORDER"].startswith("Full steps at first, then one in every n")
    assert all(text.endswith(".") for text in found.values())


def test_what_another_package_brings_is_listed_and_a_broken_one_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {
        "theirs": EntryPoint("theirs", "cachekit.policies.every:every", "cachekit.policies"),
        "broken": EntryPoint("broken", "no_such_module:policy", "cachekit.policies"),
    }
    monkeypatch.setattr(commands, "known_policies", lambda: MappingProxyType(known))
    found = rows(listed())
    assert found["theirs-N"].startswith("Recompute at steps")
    assert "no_such_module" in found["broken (can't be loaded)"]


@pytest.mark.parametrize("command", ([], ["compare"], ["policies"]), ids=" ".join)
def test_help_says_what_is_written(command: list[str]) -> None:
    """Brackets of a spec are no markup."""
    result = CliRunner().invoke(commands.app, [*command, "--help"], catch_exceptions=False)
    assert result.exit_code == 0 and "Usage:" in result.output
    assert ("[TARGET=]POLICY[@SEGMENTS][/REUSE]" in result.output) == (command == ["compare"])
