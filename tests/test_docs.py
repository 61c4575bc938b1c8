"""Every Python block of the documentation runs, prints what the page says, and every link leads somewhere.

The blocks of a page run in order in one namespace. What a page would download is replaced by a pipeline of the same class
from small random parts, and what it compiles is traced only. A ``text`` block right after a Python block is what that one
prints, ``...`` standing for any text.
"""

from __future__ import annotations

import contextlib
import doctest
import functools
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from pipelines import RECIPES
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from typer.core import TyperGroup
from typer.main import get_command

from cachekit.demo.app import app
from cachekit.demo.rows import parse_cached
from cachekit.demo.target import Solver

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
SOLVER = Solver("any", lambda seed, steps: torch.zeros(1), 50)
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def stand_in(cls: type[Any], name: str, /, **options: Any) -> Any:
    """What takes the place of ``from_pretrained``: the same class, small and random, with the scheduler of trained DiTs."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == cls.__name__)
    pipe = recipe.build(next(iter(recipe.schedulers)))
    if isinstance(pipe.scheduler, DDIMScheduler):
        pipe.scheduler = DDIMScheduler(clip_sample=False)
    return pipe


class Printed:
    """Runs a page's blocks, and compares what they print with the ``text`` blocks behind them."""

    def __init__(self) -> None:
        self.out = ""
        self.checker = doctest.OutputChecker()
        self.compared = 0

    def compare(self, example: Example) -> str | None:
        self.compared += 1
        wanted = doctest.Example("", str(example.parsed)).want
        same = self.checker.check_output(wanted, self.out, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        return None if same else f"the page says\n{wanted}\nit prints\n{self.out}"

    def run(self, page: Path) -> int:
        """Returns the number of blocks that were run."""
        document = Sybil([PythonCodeBlockParser(), CodeBlockParser("text", self.compare)]).parse(page)
        ran = 0
        for example in document.examples():
            if example.region.lexemes.get("arguments") == "text":
                example.evaluate()
                continue
            with contextlib.redirect_stdout(io.StringIO()) as out:
                example.evaluate()
            self.out, ran = out.getvalue(), ran + 1
        return ran


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(stand_in))
    # Dynamo traces as ever, but what it traced runs as it is: no compiler is needed, and no time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a page may write files
    text = page.read_text(encoding="utf-8")
    printed = Printed()
    assert printed.run(page) == len(re.findall(r"^```python$", text, re.MULTILINE))
    assert printed.compared == len(re.findall(r"^```text$", text, re.MULTILINE))


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every ``cachekit`` command in a page's ``bash`` blocks."""
    for block in SHELL.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words[:1] == ["cachekit"]:
                    yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_such_that_the_program_takes(page: Path) -> None:
    group = get_command(app)
    for name, *rest in commands(page):
        assert isinstance(group, TyperGroup)
        command = group.commands[name]
        context = command.make_context(name, rest)  # reads the arguments, and refuses unknown ones; runs nothing
        for spec in ",".join(context.params.get("policies") or ()).split(","):
            assert not spec or parse_cached(spec.rpartition("=")[2], SOLVER).policy


def test_the_readme_begins_with_two_commands_and_five_lines() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    run, test = SHELL.findall(text)
    assert run.strip().endswith("cachekit compare") and test.strip().endswith("pytest")
    assert all("-c constraints.txt" in command for command in (run, test))
    blocks = (block.splitlines() for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    five, twenty, _, fifteen = blocks
    assert sum(bool(line) for line in five) == 5
    assert sum(bool(line) for line in twenty) <= 22
    assert sum(bool(line) for line in fifteen) <= 15


def links(page: Path) -> Iterator[str]:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    yield from (link for link in LINK.findall(text) if "://" not in link)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads to no file"
        assert not anchor or anchor in anchors(target), f"{link} leads to no heading"


def test_every_page_is_listed() -> None:
    index = ROOT / "docs" / "index.md"
    listed = {(index.parent / link).resolve() for link in links(index)}
    assert {page for page in PAGES if page.parent.name == "docs" and page != index} <= listed
