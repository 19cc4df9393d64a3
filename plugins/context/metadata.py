"""Dependencies and versions out of the project's manifests, for the section ``metadata`` of contexts.

A manifest that cannot be read tells nothing. Read are pyproject.toml, setup.cfg, requirements.txt, package.json,
Cargo.toml, go.mod, pom.xml and Gemfile.
"""

from __future__ import annotations

import configparser
import json
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from pathlib import Path

from cco_sidecar import ContextRequest, Sections, hookimpl
from cco_sidecar_plugins.context._parsing import parsed


@hookimpl
def context_section(request: ContextRequest) -> Sections:
    root = Path(request.project.root)
    versions = read_dependencies(root)
    facts = {
        "dependencies": sorted(versions),
        "dependency_versions": versions,
        "python_version": read_python_version(root),
    }
    return {"metadata": facts}


REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*([^;#]*)")


def requirements(lines: Iterable[str]) -> dict[str, str]:
    """Name and version bounds of PEP 508 lines; options, links and comments are passed over."""
    found = {}
    for line in lines:
        match = REQUIREMENT.match(line)
        if match and not line.lstrip().startswith(("-", "#")) and "://" not in line.split("@")[0]:
            found[match[1].lower()] = match[2].strip()
    return found


def read_dependencies(root: Path) -> dict[str, str]:
    """Direct dependencies of the project with the bounds that its manifests give. Blocks."""
    found: dict[str, str] = {}
    for manifest, parse in DEPENDENCY_PARSERS.items():
        found |= parsed(root / manifest, parse, default={})
    return found


def pyproject_dependencies(text: str) -> dict[str, str]:
    data = tomllib.loads(text)
    project, poetry = data.get("project", {}), data.get("tool", {}).get("poetry", {})
    groups = [*project.get("optional-dependencies", {}).values(), *data.get("dependency-groups", {}).values()]
    lines = [*project.get("dependencies", []), *(line for group in groups for line in group if isinstance(line, str))]
    poetry_groups = [
        poetry.get("dependencies", {}),
        *(group.get("dependencies", {}) for group in poetry.get("group", {}).values()),
    ]
    return requirements(lines) | {
        name.lower(): value if isinstance(value, str) else str(value.get("version", ""))
        for group in poetry_groups for name, value in group.items() if name.lower() != "python"
    }  # fmt: skip


def setup_cfg_dependencies(text: str) -> dict[str, str]:
    config = configparser.ConfigParser(interpolation=None)
    config.read_string(text)
    lines = config.get("options", "install_requires", fallback="").splitlines()
    if config.has_section("options.extras_require"):
        lines += [line for _, value in config.items("options.extras_require") for line in value.splitlines()]
    return requirements(line for line in lines if line.strip())


def package_json_dependencies(text: str) -> dict[str, str]:
    data = json.loads(text)
    return {
        name: str(version)
        for key in ("dependencies", "devDependencies", "peerDependencies")
        for name, version in data.get(key, {}).items()
    }


def cargo_dependencies(text: str) -> dict[str, str]:
    data = tomllib.loads(text)
    tables = [data.get(key, {}) for key in ("dependencies", "dev-dependencies", "build-dependencies")]
    tables.append(data.get("workspace", {}).get("dependencies", {}))
    return {
        name: value if isinstance(value, str) else str(value.get("version", ""))
        for table in tables
        for name, value in table.items()
    }


def go_mod_dependencies(text: str) -> dict[str, str]:
    pattern = re.compile(
        r"^\s*(?:require\s+)?([\w.-]+\.[\w.-]+/\S+|[\w-]+\.[\w.-]+)\s+(v\S+)(?!.*// indirect)", re.MULTILINE
    )
    return dict(pattern.findall(re.sub(r"(?ms)^(replace|exclude|retract)\s*\(.*?\)", "", text)))


def pom_dependencies(text: str) -> dict[str, str]:
    namespace = {"m": "http://maven.apache.org/POM/4.0.0"}
    found = {}
    for item in ElementTree.fromstring(text).iterfind(".//m:dependency", namespace):
        group, artifact = (item.findtext(f"m:{name}", "", namespace).strip() for name in ("groupId", "artifactId"))
        found[f"{group}:{artifact}"] = item.findtext("m:version", "", namespace).strip()
    return found


def gemfile_dependencies(text: str) -> dict[str, str]:
    return {
        name: version or ""
        for name, version in re.findall(
            r"""^\s*gem\s+['"]([^'"]+)['"](?:\s*,\s*['"]([^'"]+)['"])?""", text, re.MULTILINE
        )
    }


DEPENDENCY_PARSERS: dict[str, Callable[[str], dict[str, str]]] = {
    "setup.cfg": setup_cfg_dependencies,
    "requirements.txt": lambda text: requirements(text.splitlines()),
    "pyproject.toml": pyproject_dependencies,
    "package.json": package_json_dependencies,
    "Cargo.toml": cargo_dependencies,
    "go.mod": go_mod_dependencies,
    "pom.xml": pom_dependencies,
    "Gemfile": gemfile_dependencies,
}


def read_python_version(root: Path) -> str | None:
    """The version that .python-version names, else the lowest that requires-python allows. Blocks."""
    pinned = parsed(root / ".python-version", lambda text: text.split()[0])
    if pinned:
        return str(pinned)
    wanted = parsed(root / "pyproject.toml", lambda text: tomllib.loads(text).get("project", {}).get("requires-python"))
    if not wanted:
        pattern = r"python_requires\s*=\s*['\"]?([^'\"\n]+)"
        wanted = next(
            (
                m[1]
                for name in ("setup.cfg", "setup.py")
                if (m := parsed(root / name, lambda text: re.search(pattern, text)))
            ),
            None,
        )
    match = re.search(r"(?:>=|~=|==|\^)?\s*(\d+(?:\.\d+)+)", str(wanted or ""))
    return match[1] if match else None
