"""What a wheel, an sdist and an editable install hold, and which names they let a user import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cachekit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"cachekit": "cachekit", "cachekit.adapters": "adapters", "cachekit.policies": "policies"}
LINKED = ("adapters", "policies")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
# Builds and installs that need neither an index nor a download.
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")
PROBE = "class Probe:\n    pass\n\n\ndef answer() -> int:\n    return 42\n"

INSPECT = """
import importlib, importlib.metadata, importlib.util, json, pickle, pkgutil, sys
import cachekit

for found in pkgutil.walk_packages(cachekit.__path__, "cachekit."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "cachekit"}
probe = modules["cachekit.policies.probe"].Probe
(script,) = importlib.metadata.entry_points(group="console_scripts", name="cachekit")
print(json.dumps({
    "files": {name: module.__file__ for name, module in modules.items()},
    "top_level": [name for name in ("adapters", "policies") if importlib.util.find_spec(name)],
    "module": probe.__module__,
    "survives_pickle": type(pickle.loads(pickle.dumps(probe()))) is probe,
    "script": script.value if callable(script.load()) else None,
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, without this process's PYTHONPATH; return what it printed."""
    done = attempt(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def attempt(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "MYPYPATH", "PYTHONHOME"}}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False)


def python_files(tree: Path) -> set[str]:
    """The modules in the tree by the path at which they should be installed."""
    files = set()
    for package, folder in FOLDERS.items():
        for parent, _, names in os.walk(tree / folder):  # does not enter links
            inside = Path(package.replace(".", "/"), Path(parent).relative_to(tree / folder))
            files |= {(inside / name).as_posix() for name in names if name.endswith(".py")}
    return files


def contents(wheel: Path) -> dict[str, int]:
    """Checksum by name, without the metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {item.filename: item.CRC for item in archive.infolist() if ".dist-info/" not in item.filename}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def build_wheel(source: Path, into: Path) -> Path:
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", into, source, cwd=into)
    (wheel,) = into.glob("*.whl")
    return wheel


def environment(path: Path, *install: str | Path) -> Path:
    """Make a virtual environment that borrows this one's packages, but none of its editable installs."""
    venv.create(path, with_pip=False, symlinks=os.name != "nt")
    python = path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=path).strip())
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    own.joinpath("borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    run(python, *PIP[1:], "install", *OFFLINE, *install, cwd=path)
    return python


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from, since builds write into their tree, with a probe in each folder that should be packed."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in LINKED:
        (copy / folder / "probe.py").write_text(PROBE, encoding="utf-8")
    weights = copy / "cachekit" / "demo" / "weights"
    weights.mkdir(exist_ok=True)
    (weights / "probe.safetensors").write_bytes(b"probe")
    return copy


@pytest.fixture(scope="session")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session", params=["wheel", "editable"])
def installed(
    request: pytest.FixtureRequest, tree: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """The interpreter that has the project installed, and the folder from which its modules should come."""
    home = tmp_path_factory.mktemp(str(request.param))
    if request.param == "wheel":
        yield environment(home, wheel), home
    else:
        yield environment(home, "--editable", tree), tree


def test_every_package_is_listed() -> None:
    found = {Path(name).parent.as_posix().replace("/", ".") for name in python_files(ROOT)}
    assert found == set(project()["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative(name: str) -> None:
    link = ROOT / "cachekit" / name
    # Where git makes no links, it writes the target's path into a file.
    target = os.readlink(link) if link.is_symlink() else link.read_text(encoding="utf-8").strip()
    assert Path(target) == Path("..", name)


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([clause.operator for clause in pin.specifier] == ["=="] for pin in pins)
    table = project()["project"]
    wanted = [*table["dependencies"], *(line for extra in table["optional-dependencies"].values() for line in extra)]
    names = {canonicalize_name(Requirement(line).name) for line in wanted} - {canonicalize_name(table["name"])}
    assert names <= {canonicalize_name(pin.name) for pin in pins}


@pytest.mark.slow
def test_wheel_holds_the_tree_and_nothing_else(tree: Path, wheel: Path) -> None:
    weights = (tree / "cachekit" / "demo" / "weights").iterdir()
    data = {"cachekit/py.typed", *(path.relative_to(tree).as_posix() for path in weights)}
    assert set(contents(wheel)) == python_files(tree) | data
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert tops == {"cachekit", f"cachekit_dit-{cachekit.__version__}.dist-info"}


@pytest.mark.slow
def test_wheel_needs_no_links(tree: Path, wheel: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tree, tmp_path / "tree", symlinks=True, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for name in LINKED:
        link = copy / "cachekit" / name
        link.unlink()
        link.write_text(f"../{name}", encoding="utf-8")
    assert contents(build_wheel(copy, tmp_path)) == contents(wheel)


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, tree, cwd=tmp_path)
    (sdist,) = tmp_path.glob("cachekit_dit-*.tar.gz")
    assert contents(build_wheel(sdist, tmp_path)) == contents(wheel)


@pytest.mark.slow
def test_installed_names(installed: tuple[Path, Path], tmp_path: Path) -> None:
    python, home = installed
    seen = json.loads(run(python, "-c", INSPECT, cwd=tmp_path))
    files = [Path(name).resolve() for name in seen["files"].values()]
    assert all(file.is_relative_to(home.resolve()) for file in files)
    assert len(set(files)) == len(files), "a module was loaded under two names"
    assert {"cachekit.adapters", "cachekit.adapters.probe", "cachekit.policies"} <= set(seen["files"])
    assert seen["top_level"] == []
    assert seen["module"] == "cachekit.policies.probe"
    assert seen["survives_pickle"]
    assert seen["script"] == "cachekit.demo.cli:main"


USE = """\
from cachekit.adapters.probe import answer as number
from cachekit.policies.probe import answer
right: int = answer() + number()
wrong: str = answer()
"""


@pytest.mark.slow
def test_type_checkers_follow_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", wheel)
    (tmp_path / "use.py").write_text(USE, encoding="utf-8")
    # Reading torch's sources would take most of a minute and says nothing about this project.
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n[mypy-torch.*]\nfollow_imports = skip\n", encoding="utf-8")
    done = attempt(sys.executable, "-m", "mypy", "--python-executable", python, "use.py", cwd=tmp_path)
    (line,) = (line for line in done.stdout.splitlines() if "error:" in line)
    assert line.startswith("use.py:4: error: Incompatible types in assignment"), done.stdout

    (tmp_path / "pyrightconfig.json").write_text('{"include": ["use.py"], "typeCheckingMode": "strict"}', encoding="utf-8")
    done = attempt(sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", python, cwd=tmp_path)
    found = [(item["range"]["start"]["line"] + 1, item.get("rule")) for item in json.loads(done.stdout)["generalDiagnostics"]]
    assert found == [(4, "reportAssignmentType")], done.stdout
