"""Dependencies of the modules that a project has below its root, for the plugins of cco_sidecar: Maven's modules, the
projects of a .NET solution, and which manifests the members of a workspace have. Those of Gradle, Go and Dart are in
_manifests.py.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cco_sidecar_plugins.context._parsing import File, ProjectFiles

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

Versions = dict[str, str]  # by name: the bounds as the manifest gives them; alternatives are joined by " || "
MOST_MODULES = 300  # of one project that are read


def merged(tables: Iterable[Versions]) -> Versions:
    """All names; of each the first version that is not empty."""
    found: Versions = {}
    for table in tables:
        for name, version in table.items():
            found[name] = found.get(name) or version
    return found


def without_own(read: Iterable[tuple[str, Versions] | None]) -> Versions:
    """What was ``read`` of a project's packages by their names, and none of them."""
    packages = [each for each in read if each]
    own = {name for name, _ in packages}
    return {name: version for name, version in merged(found for _, found in packages).items() if name not in own}


# -- workspaces


def package_members(file: File, data: dict[str, Any]) -> list[str]:
    """The package.json of each workspace that npm, Yarn, Bun or pnpm know of."""
    workspaces = data.get("workspaces")
    patterns = workspaces.get("packages") if isinstance(workspaces, dict) else workspaces
    return members(
        file, patterns or file.files.parsed("pnpm-workspace.yaml", lambda pnpm: yaml_list(pnpm.text(), "packages"))
    )


def yaml_list(text: str, key: str) -> list[str]:
    """The list ``key`` at the top of a YAML text, one item a line or all in brackets."""
    if flow := re.search(rf"(?m)^{key}:[ \t]*\[([^\]#]*)\]", text):
        return [item.strip(" \t\r\n\"'") for item in flow[1].split(",")]
    lines = (line.strip() for line in yaml_block(text, key))
    return [line[1:].partition(" #")[0].strip(" \t\"'") for line in lines if line.startswith("-")]


def yaml_block(text: str, key: str) -> list[str]:
    """The lines below ``key`` at the top of a YAML text."""
    after = re.split(rf"(?m)^{key}:[ \t]*(?:#.*)?\r?$", text, maxsplit=1)[1:]
    return re.split(r"(?m)^\w", after[0], maxsplit=1)[0].splitlines() if after else []


def umbrella_members(file: File) -> list[str]:
    """The mix.exs of each application of an umbrella project."""
    path = re.search(r"""\bapps_path:\s*"([^"\n]+)\"""", file.text())
    return members(file, [f"{path[1]}/*"] if path else None)


def members(file: File, patterns: Any, without: Any = None) -> list[str]:
    """The listed files of ``file``'s name in the folders that ``patterns`` name, but not ``without``, nor one with
    ``!``.
    """
    texts = texts_of(patterns)
    wanted = [posixpath.normpath(text) for text in texts if not text.startswith("!")]
    unwanted = [posixpath.normpath(text[1:]) for text in texts if text.startswith("!")]
    unwanted += map(posixpath.normpath, texts_of(without))
    found = file.files.ending_with(f"/{file.name}".lower()) if wanted else []
    return [
        name
        for name in found
        if is_one_of(posixpath.dirname(name), wanted) and not is_one_of(posixpath.dirname(name), unwanted)
    ]


def texts_of(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)][:MOST_MODULES] if isinstance(value, list) else []


def is_one_of(folder: str, patterns: list[str]) -> bool:
    """Whether a pattern matches ``folder``; one without ``**`` only at its own depth."""
    depth = folder.count("/")
    return any(
        fnmatch.fnmatchcase(folder, pattern) and ("**" in pattern or pattern.count("/") == depth)
        for pattern in patterns
    )


# -- Maven


def maven_dependencies(file: File) -> Versions:
    """The project's own and its modules', not those of build plugins, and none of the modules themselves."""
    found, own = list[Versions](), set[str]()
    root, seen = file.files.parsed_once(file.name, Pom, None), {file.name}
    waiting = [root] if root else []
    while waiting:
        pom = waiting.pop(0)
        own.add(pom.name)
        found.append(pom.dependencies)
        for module in pom.modules:
            if module not in seen and len(seen) < MOST_MODULES:
                seen.add(module)
                if read := file.files.parsed_once(module, Pom, pom):
                    waiting.append(read)
    return {name: version for name, version in merged(found).items() if name not in own}


class Pom:
    """A pom.xml, below the one ``above`` that names it as a module. Its versions also come out of
    ``dependencyManagement`` and properties of both, where it has that one as its parent; "" where another parent or a
    bill of materials gives them.
    """

    def __init__(self, file: File, above: Pom | None) -> None:
        root = file.xml()
        if root.tag != "project":
            raise ValueError(f"it is no Maven project but <{root.tag}>")
        text = root.findtext
        parent = above if above and (text("parent/artifactId") or "").strip() == above.artifact else None
        self.artifact: str = (text("artifactId") or "").strip()
        self.properties: dict[str, str] = dict(parent.properties) if parent else {}
        self.properties |= {item.tag: (item.text or "").strip() for item in root.iterfind("properties/*")}
        for name in ("groupId", "artifactId", "version"):
            inherited = (text(f"parent/{name}") or "").strip()
            self.properties[f"project.parent.{name}"] = inherited
            self.properties[f"project.{name}"] = self.properties[f"pom.{name}"] = (
                text(name) or ""
            ).strip() or inherited
        self.name = f"{self.properties['project.groupId']}:{self.artifact}"
        managed = self._artifacts(root, "dependencyManagement/dependencies/dependency")
        inherits = parent.managed if parent else {}  # often thousands, of which most modules change none
        self.managed: Versions = merged((managed, inherits)) if managed else inherits
        own = merged(self._artifacts(root, f"{where}dependencies/dependency") for where in ("", "profiles/profile/"))
        self.dependencies = {name: version or self.managed.get(name, "") for name, version in own.items()}
        self.modules = list(modules_of(root, posixpath.dirname(file.name)))
        if not self.modules:  # nobody inherits them
            self.properties, self.managed = {}, {}

    def _artifacts(self, root: Element, path: str) -> Versions:
        found: Versions = {}
        for item in root.iterfind(path):
            group, artifact, version = (
                filled(item.findtext(name, ""), self.properties) for name in ("groupId", "artifactId", "version")
            )
            if group and artifact:
                found[f"{group}:{artifact}"] = found.get(f"{group}:{artifact}") or version
        return found


def modules_of(root: Element, folder: str) -> Iterator[str]:
    """The files of a Maven project's modules, each named by its folder or itself."""
    for path in ("modules/module", "profiles/profile/modules/module"):
        for item in root.iterfind(path):
            place = posixpath.normpath(posixpath.join(folder, (item.text or "").strip().replace("\\", "/")))
            yield place if place.endswith(".xml") else posixpath.join(place, "pom.xml")


def filled(text: str, properties: dict[str, str]) -> str:
    """``text`` with its properties' values; "" where one is not known here."""
    for _ in range(10):  # properties may name others, and one another
        if "${" not in text or len(text) > 500:
            break
        text = re.sub(r"\$\{([^${}]+)\}", lambda match: properties.get(match[1], "${}")[:500], text)
    return "" if "${" in text else text.strip()


# -- .NET


PROJECTS = (".csproj", ".fsproj", ".vbproj")


def has_solution(files: ProjectFiles) -> bool:
    """Whether a solution or a project lies in the root or right below it, and is not a sample of another program."""
    return any(name.count("/") <= 1 for name in files.ending_with(*PROJECTS, ".sln", ".slnx"))


def dotnet_dependencies(files: ProjectFiles) -> Versions:
    """The packages of all .NET projects, versions also out of Directory.Packages.props."""
    shared = files.ending_with("directory.packages.props")
    central = merged(files.parsed_once(name, central_versions) or {} for name in shared)
    common = files.ending_with("directory.build.props", "directory.build.targets", "packages.config")
    places = (*files.ending_with(*PROJECTS), *common, *shared)
    found = merged(files.parsed_once(name, package_references) or {} for name in places)
    return {name: version or central.get(name, "") for name, version in found.items()}


def package_references(file: File) -> Versions:
    """Of a project file, of one that it shares with others, or of a packages.config."""
    root = file.xml()
    old = {item.get("id", ""): item.get("version", "") for item in root.iterfind("package")}
    return merged((packages(root, "PackageReference"), packages(root, "GlobalPackageReference"), old))


def central_versions(file: File) -> Versions:
    return packages(file.xml(), "PackageVersion")


def packages(root: Element, tag: str) -> Versions:
    """Of the items ``tag``; "" for a version in a property. ``Update`` changes what another file includes."""
    found: Versions = {}
    for item in root.iter(tag):
        versions = ((item.get(name) or item.findtext(name) or "").strip() for name in ("VersionOverride", "Version"))
        version = next(filter(None, versions), "")
        for name in (item.get("Include") or "").split(";"):
            if (name := name.strip()) and "$(" not in name:
                found[name] = found.get(name) or ("" if "$(" in version else version)
    return found
