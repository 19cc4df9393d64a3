"""Dependencies out of the manifests of Gradle, Go, Dart, Scala and Swift, and of the modules that they name, for the
plugin metadata of cco_sidecar. No manifest is run.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from typing import Any

from cco_sidecar_plugins._patterns import late_pattern
from cco_sidecar_plugins.context._modules import (
    MOST_MODULES,
    Versions,
    members,
    merged,
    without_own,
    yaml_block,
    yaml_list,
)
from cco_sidecar_plugins.context._parsing import File, ProjectFiles

# -- Gradle

DEPENDENCY = (  # by itself, by the parts of its name, by its name in a catalog; else what is none, as project(':x')
    r"""(?:(?:enforcedP|p)latform\s*\(\s*)?"""
    r"""(?:["']([\w.-]+:[\w.-]+)(?::([^"'@:]*))?(?:[^"'\n]{0,200}["'])?"""
    r"""|group\s*[:=]\s*["']([\w.-]+)["']\s*,\s*name\s*[:=]\s*["']([\w.-]+)["']"""
    r"""(?:\s*,\s*version\s*[:=]\s*["']([^"']*)["']?)?"""
    r"""|(\w+)\.(\w[\w.]*)"""
    r"""|\w+\([^()\n]{0,200}\))"""
)
CALL = late_pattern(
    r"(?m)(?:^|[{;])[ \t]*"
    r"\w*(?:[iI]mplementation|[aA]pi|[cC]ompileOnly|[rR]untimeOnly|[aA]nnotationProcessor|kapt|ksp)\b"
    r"[\s(\[]*" + DEPENDENCY
)
FURTHER = late_pattern(r"[\s()\]]*+,[\s(\[]*+" + DEPENDENCY)
CATALOG = late_pattern(
    r"""(?:\bcreate\(\s{0,9}["'](\w{1,100})["']\s{0,9}\)|\b(\w{1,100}))\s{0,9}\{\s{0,99}from\s{0,9}\(?\s{0,9}"""
    r"""(?:\w{1,100}\.){0,2}files\(\s{0,9}["']([^"'\n]{1,200})["']"""
)
INCLUDE = late_pattern(r"""(?m)(?:^|;)[ \t]*include\b[\s(]*+((?:["'][^"'\n]{1,200}["']\s*+,?\s*+)++)""")
MOVED = late_pattern(
    r"""(?m)(?:^|;)[ \t]*project\(\s*["']([^"'\n]{1,200})["']\s*\)"""
    r"""\.projectDir\s*=\s*(?:new\s+)?[fF]ile\(\s*(?:\w+\s*,\s*)?"""
    r"""["']([^"'\n]{1,200})["']"""
)
Catalog = dict[str, Versions]  # by the names that build files have for a library, or for a bundle of them


def gradle_modules(file: File) -> Versions:
    """Those of the projects that a settings.gradle or settings.gradle.kts includes."""
    text = without_comments(file.text())
    names = (name for names in INCLUDE.findall(text) for name in re.findall(r"""["']([^"'\n]+)""", names)[::2])
    moved = {name.strip(":"): place for name, place in MOVED.findall(text)}
    included = dict.fromkeys(name.strip(":") for name in names)
    folders = [moved.get(name, name.replace(":", "/")) for name in included][:MOST_MODULES]
    places = [posixpath.normpath(f"{folder}/build.gradle{end}") for folder in folders for end in ("", ".kts")]
    return merged(gradle_project(file.files, place) for place in places)


def gradle_dependencies(file: File) -> Versions:
    return gradle_project(file.files, file.name)


def gradle_project(files: ProjectFiles, place: str) -> Versions:
    """Those that its build file writes, and those that it names by their names in a catalog."""
    found, uses = files.parsed_once(place, gradle_file) or ({}, [])
    places = {"libs": "gradle/libs.versions.toml"}
    for settings in ("settings.gradle", "settings.gradle.kts"):
        places |= files.parsed_once(settings, catalog_places) or {}
    named = [
        (files.parsed_once(places[catalog], catalog_file) or {}).get(name.removesuffix(".get"), {})
        for catalog, name in uses
        if catalog in places
    ]
    return merged((found, *named))


def gradle_file(file: File) -> tuple[Versions, list[tuple[str, str]]]:
    """(those that are written as ``"group:name:version"`` or ``group: …, name: …``, "" for a version in a variable;
    (catalog, name in it) of others).
    """
    found, uses = Versions(), list[tuple[str, str]]()
    for dependency in in_calls(without_comments(file.text())):
        together, version, group, name, other, catalog, alias = (part or "" for part in dependency.groups())
        version = version or other
        if catalog:
            uses.append((catalog, alias))
        elif together or name:
            found.setdefault(together or f"{group}:{name}", "" if "$" in version else version)
    return found, uses


def in_calls(text: str) -> Iterator[re.Match[str]]:
    """Each DEPENDENCY, of a call that has several one after the other."""
    for call in CALL.finditer(text):
        found: re.Match[str] | None = call
        while found:
            yield found
            found = FURTHER.match(text, found.end())


def catalog_places(file: File) -> dict[str, str]:
    """The files of the catalogs that settings name, by the names that build files have for them."""
    found = CATALOG.findall(without_comments(file.text()))
    return {made or name: posixpath.normpath(place) for made, name, place in found}


def catalog_file(file: File) -> Catalog:
    data = file.toml()
    versions, libraries = file.table(data, "versions"), file.table(data, "libraries")
    catalog = {in_build_files(alias): library(value, versions) for alias, value in libraries.items()}
    for alias, aliases in file.table(data, "bundles").items():
        held = [catalog.get(in_build_files(str(each)), {}) for each in (aliases if isinstance(aliases, list) else ())]
        catalog[f"bundles.{in_build_files(alias)}"] = merged(held)
    return catalog


def in_build_files(alias: str) -> str:
    return re.sub("[-_]", ".", alias)


def library(value: Any, versions: dict[str, Any]) -> Versions:
    if isinstance(value, str):
        parts = [*value.split(":"), "", ""]
        return {f"{parts[0]}:{parts[1]}": parts[2]} if parts[1] else {}
    given = value if isinstance(value, dict) else {}
    version: Any = given.get("version")
    if isinstance(version, dict) and "ref" in version:
        version = versions.get(str(version["ref"]))
    if isinstance(version, dict):  # a rich one
        version = next((version[name] for name in ("strictly", "require", "prefer") if name in version), "")
    name = given.get("module") or f"{given.get('group', '')}:{given.get('name', '')}"
    return {name: version if isinstance(version, str) else ""} if re.fullmatch(r"[\w.-]+:[\w.-]+", str(name)) else {}


def without_comments(text: str) -> str:
    """Without what follows ``//`` and what stands between ``/*`` and ``*/``; in quotes these are signs as others."""
    return COMMENT.sub(lambda found: found[1] or "", text)


COMMENT = late_pattern(r"""(?s)("(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+')|//[^\n]*+|/\*.*?(?:\*/|\Z)""")


# -- Go


def go_dependencies(file: File) -> Versions:
    """What the module in the root and those of a workspace require, and none of these modules."""
    folders = ["", *(file.files.parsed_once("go.work", go_folders) or [])][:MOST_MODULES]
    places = dict.fromkeys(posixpath.normpath(posixpath.join(folder, "go.mod")) for folder in folders)
    read = [found for place in places if (found := file.files.parsed_once(place, go_mod))]
    own = {module for module, _ in read}
    return {name: version for name, version in merged(each for _, each in read).items() if name not in own}


def go_workspace(file: File) -> Versions:
    """The same where the root has no module, whose go.mod tells of the workspace too."""
    return {} if file.files.parsed_once("go.mod", go_mod) else go_dependencies(file)


def go_folders(file: File) -> list[str]:
    return [unquoted(words[1]) for words, _ in go_lines(file.text()) if words[:1] == ["use"] and len(words) == 2]


def go_mod(file: File) -> tuple[str, Versions]:
    """(the module's name, what it requires itself, without what is marked as indirect)."""
    module, found = "", Versions()
    for words, comment in go_lines(file.text()):
        if words[:1] == ["module"] and len(words) == 2:
            module = unquoted(words[1])
        if words[:1] == ["require"] and len(words) == 3 and not re.match(r"\s*indirect\s*(;|$)", comment):
            found[unquoted(words[1])] = words[2]
    return module, found


def go_lines(text: str) -> Iterator[tuple[list[str], str]]:
    """The words of each line, those of a block with the word before it, and the comment."""
    block = ""
    for line in text.splitlines():
        code, _, comment = line.partition("//")
        words = code.replace("(", " ( ").split()
        if words[1:] == ["("]:
            block = words[0]
        elif words[:1] == [")"]:
            block = ""
        elif words:
            yield [block, *words] if block else words, comment


def unquoted(text: str) -> str:
    return text.strip("\"'`")


# -- Dart


def pubspec_dependencies(file: File) -> Versions:
    """The project's own, then those of its workspace's packages, or of melos', which are none themselves."""
    melos = file.files.parsed(
        "melos.yaml", lambda melos: [yaml_list(melos.text(), key) for key in ("packages", "ignore")]
    )
    workspace = yaml_list(file.text(), "workspace")
    places = (file.name, *(members(file, workspace) if workspace else members(file, *(melos or ([],)))))
    return without_own(file.files.parsed_once(place, pubspec) for place in places)


def pubspec(file: File) -> tuple[str, Versions]:
    text = file.text()
    name = re.search(r"(?m)^name:[ \t]*[\"']?(\w+)", text)
    blocks = (yaml_block(text, key) or lines_of_braces(text, key) for key in ("dependencies", "dev_dependencies"))
    return name[1] if name else "", merged(map(pubspec_block, blocks))


def pubspec_block(lines: list[str]) -> Versions:
    """The packages, with a version that stands beside or below one."""
    found, depth, last = Versions(), "", ""
    for indent, name, value in re.findall(r"(?m)^([ \t]+)([\w-]+):[ \t]*(.*)$", "\n".join(lines)):
        depth = depth or indent
        version = unquoted(re.split(r"(?:^|\s)#", value, maxsplit=1)[0].strip())
        if indent == depth:
            last, inside = name, IN_BRACES.search(version)
            version = unquoted(inside[1].strip()) if inside else version
            found[name] = "" if version.startswith("{") else version
        elif name == "version" and last:
            found[last] = version
    return found


IN_BRACES = late_pattern(
    r"""^\{(?:.{0,500}[\s,{])??version:[ \t]{1,9}("[^"\n]{0,99}"|'[^'\n]{0,99}'|[^{},"'\n]{0,99})"""
)


def lines_of_braces(text: str, key: str) -> list[str]:
    """The lines that what stands in braces after ``key``, at the top of a YAML text, would have without them."""
    begin, lines, depth = re.search(rf"(?m)^{key}:[ \t]*(?=\{{)", text), list[str](), 0
    for part in FLOW.findall(text, begin.end()) if begin else ():
        if part in "{}":
            depth += 1 if part == "{" else -1
            if not depth:
                break
        elif part[0] != "#":
            lines.append("  " * depth + part)
    return lines


FLOW = late_pattern(
    r"""[{}]|(?<!\S)#[^\n]*+|(?<![\w.+-])\w++:(?!\S)[ \t]*+(?:"[^"\n]{0,99}"|'[^'\n]{0,99}'|[^{},"'\n]*+)"""
)


# -- Scala and Swift

SBT = late_pattern(r'"([\w.-]{1,100})"\s{0,99}%{1,3}\s{0,99}"([\w.-]{1,100})"\s{0,99}%\s{0,99}(?:"([^"\n]{1,100})")?')
SBT_PROJECT = late_pattern(
    r'\bval\s{1,9}([\w`-]{1,100})\s{0,9}(?::\s{0,9}Project\s{0,9})?=\s{0,9}\(?\s{0,9}project\b|\bfile\(\s{0,9}"([^"\n]{1,200})"'
)
SWIFT = late_pattern(
    r'\.package\s*\(\s{0,99}(?:name:\s{0,99}"[^"\n]{0,200}"\s{0,99},\s{0,99})?url:\s{0,99}"([^"\n]{1,500})"\s{0,99},\s{0,99}'
    r'(?:(?:\.upToNextM\w{4}\(\s{0,99})?\.?(from|exact|branch|revision)\s{0,9}[:(]\s{0,99}"([^"\n]{1,100})"'
    r'|"([^"\n]{1,100})"\s{0,9}(\.\.[.<])\s{0,9}"([^"\n]{1,100})")'
)


def sbt_dependencies(file: File) -> Versions:
    """Those of a build.sbt, of the projects that it names, and of the list that is usual for large ones; "" for a
    version in a variable.
    """
    named = SBT_PROJECT.findall(without_comments(file.text()))
    folders = dict.fromkeys(place or name.strip("`") for name, place in named)
    places = dict.fromkeys(posixpath.normpath(f"{folder}/build.sbt") for folder in [*folders][:MOST_MODULES])
    read = (file.files.parsed_once(place, sbt_file) or {} for place in ("project/Dependencies.scala", *places))
    return merged((sbt_file(file), *read))


def sbt_file(file: File) -> Versions:
    found = SBT.findall(without_comments(file.text()))
    return {f"{group}:{name}": version for group, name, version in found}


def swift_dependencies(file: File) -> Versions:
    """By the names of their repositories."""
    found: Versions = {}
    for url, kind, version, low, sign, high in SWIFT.findall(without_comments(file.text())):
        name = url.rstrip("/").rpartition("/")[2].removesuffix(".git")
        found[name] = f"{kind}: {version}" if kind else f"{low}{sign}{high}"
    return found
