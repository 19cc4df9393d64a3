"""Packaging: one file, one wheel, and nothing in the repository that belongs elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import msgspec
import pytest
from conftest import ROOT, clean_environment, copy_project

import cco_sidecar

PROJECT_TABLE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ALLOWED = {"pyproject.toml", "cco_sidecar.py", "plugins", "tests", "vendor_schemas", "LICENSE", "README.md"}


def run(*command: str, cwd: Path, **env: str) -> str:
    ended = subprocess.run(command, cwd=cwd, env=clean_environment(**env), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def names_in(folder: str, pattern: str) -> list[str]:
    return sorted(
        path.relative_to(ROOT / folder).as_posix()
        for path in (ROOT / folder).rglob(pattern)
        if "__pycache__" not in path.parts
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_project(tmp_path_factory.mktemp("wheel"))
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", cwd=folder)
    return next((folder / "dist").glob("*.whl"))


def inline_metadata() -> str:
    """The PEP 723 block of the module as TOML."""
    block = re.search(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", (ROOT / "cco_sidecar.py").read_text())
    assert block
    return re.sub(r"(?m)^# ?", "", block[1])


def test_the_package_wants_what_the_file_alone_wants_and_the_library_of_http2() -> None:
    inline = tomllib.loads(inline_metadata())
    assert inline["requires-python"] == PROJECT_TABLE["requires-python"]
    assert PROJECT_TABLE["dependencies"] == [*inline["dependencies"], "h2>=4.4.1"]


def test_the_line_about_missing_packages_names_every_dependency() -> None:
    dependencies = tomllib.loads(inline_metadata())["dependencies"]
    names = [re.split(r"[^A-Za-z0-9-]", dependency)[0] for dependency in dependencies]
    assert f"`pip install {' '.join(names)}`" in (ROOT / "cco_sidecar.py").read_text()


def test_the_module_is_an_executable_script_of_uv() -> None:
    assert (ROOT / "cco_sidecar.py").read_text().startswith("#!/usr/bin/env -S uv run --script\n")
    assert (ROOT / "cco_sidecar.py").stat().st_mode & 0o100


def test_the_wheel_holds_the_module_the_plugins_and_the_schemas_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = sorted(archive.namelist())
        metadata = next(archive.read(name).decode() for name in found if name.endswith("/METADATA"))
    info = f"cco_sidecar-{cco_sidecar.__version__}.dist-info"
    wanted = [
        "cco_sidecar.py",
        *(f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")),
    ]
    wanted += [f"cco_sidecar_plugins/{name}" for name in names_in("plugins", "*.*")]
    wanted += [f"cco_sidecar_schemas/{name}" for name in names_in("vendor_schemas", "*.json")]
    assert found == sorted(wanted)
    assert "examples/house_rules.py" in names_in("plugins", "*.py") and "openapi.json" in names_in(
        "vendor_schemas", "*.json"
    )
    assert f"Version: {cco_sidecar.__version__}\n" in metadata and "License-Expression: MIT" in metadata


def test_an_installed_wheel_finds_every_plugin_and_schema_that_is_bundled(wheel: Path, tmp_path: Path) -> None:
    # What it needs is linked from here, but not ourselves, who may be installed here for development.
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    home = tmp_path / "venv/bin"
    uv = str(Path(sys.executable).with_name("uv"))
    run(uv, "pip", "install", "--offline", "--no-deps", "--python", str(home / "python"), str(wheel), cwd=tmp_path)
    place = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    for package in Path(msgspec.__file__).parent.parent.iterdir():
        if not re.match(r"_*(editable|cco_sidecar)", package.name) and package.suffix != ".pth":
            (place / package.name).symlink_to(package)
    work = tmp_path / "work"
    work.mkdir()

    assert run(str(home / "cco"), "--version", cwd=work) == f"cco {cco_sidecar.__version__}\n"
    listed = run(str(home / "cco"), "plugins", "--format", "csv", cwd=work)
    installed = [line.split(",")[:2] for line in listed.splitlines() if "cco_sidecar_plugins" in line]
    assert installed == [
        [Path(name).stem, str(place / "cco_sidecar_plugins" / name)] for name in names_in("plugins", "[!_]*.py")
    ]
    assert not [line for line in listed.splitlines()[1:] if line.split(",")[-1]], listed

    assert "doctor" in run(str(home / "cco"), "--help", cwd=work)
    assert run(str(home / "cco"), "demo", cwd=work).splitlines()[-1].endswith("your repository was only read")

    code = "import cco_sidecar, cco_sidecar_schemas as s; print(cco_sidecar.__file__, *s.__path__)"
    module, schemas = run(str(home / "python"), "-c", code, cwd=work).split()
    assert Path(module) == place / "cco_sidecar.py"
    assert sorted(path.name for path in Path(schemas).glob("*.json")) == names_in("vendor_schemas", "*.json")


def test_the_top_level_of_the_repository_holds_only_what_belongs_there() -> None:
    listed = run("git", "ls-files", cwd=ROOT).splitlines()
    assert "cco_sidecar.py" in listed
    top = {name.partition("/")[0] for name in listed}
    assert {name for name in top if not name.startswith(".")} <= ALLOWED
    assert [
        name for name in listed if re.search(r"\.(pyc|log|db|whl|orig|rej)$|(^|/)(dist|build|__pycache__)/", name)
    ] == []


def test_every_bundled_plugin_has_its_row_and_says_first_what_it_adds() -> None:
    table = (ROOT / "plugins/README.md").read_text().partition("| plugin |")[2].partition("\n\n")[0]
    told = re.findall(r"`(\w+/\w+)`", table)
    assert sorted(told) == sorted(name.removesuffix(".py") for name in names_in("plugins", "*/[!_]*.py"))
    stems = [name.partition("/")[2] for name in told]  # by which plugins are told apart
    assert len(stems) == len(set(stems))
    for name in names_in("plugins", "*.py"):
        first = (ROOT / "plugins" / name).read_text().partition("\n")[0]
        assert re.match(r'"""[A-Z].{20,}', first), name
    # By this word the service knows its own files in a repository.
    assert [
        name for name in names_in("plugins", "*.py") if "cco_sidecar" not in (ROOT / "plugins" / name).read_text()
    ] == []


def test_every_link_of_a_readme_leads_to_a_file_and_a_heading_that_are_there() -> None:
    def anchors(page: Path) -> set[str]:
        headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()))
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    followed = 0
    for name in ("README.md", "plugins/README.md", "tests/benchmarks/README.md"):
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / name).read_text()):
            place, _, anchor = link.partition("#")
            page = (ROOT / name).parent / place if place else ROOT / name
            assert page.exists() and (not anchor or anchor in anchors(page)), f"{name}: {link}"
            followed += 1
    assert followed > 50
