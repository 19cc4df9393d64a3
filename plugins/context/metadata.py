"""Dependencies and versions out of the project's manifests, for the section ``metadata`` of contexts.

Read are pyproject.toml, setup.cfg, setup.py (never run), requirements.txt, package.json, Cargo.toml, go.mod, pom.xml,
build.gradle, Gemfile, composer.json, mix.exs, pubspec.yaml, build.sbt and Package.swift, each in the root, what
requirements.txt and setup.cfg include from inside it, and the modules that package.json, Cargo.toml, go.work, pom.xml,
settings.gradle, mix.exs, pubspec.yaml, build.sbt or a .NET solution have there; and those of rarer languages. What
cannot be read tells nothing, and costs one line in the log.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cco_sidecar import MB, ContextRequest, ProjectState, Sections, hookimpl
from cco_sidecar_plugins._patterns import late_pattern
from cco_sidecar_plugins.context._first_files import TYPE_BY_MANIFEST
from cco_sidecar_plugins.context._manifests import (
    go_dependencies,
    go_workspace,
    gradle_dependencies,
    gradle_modules,
    pubspec_dependencies,
    sbt_dependencies,
    swift_dependencies,
)
from cco_sidecar_plugins.context._modules import (
    Versions,
    dotnet_dependencies,
    has_solution,
    maven_dependencies,
    members,
    merged,
    package_members,
    texts_of,
    umbrella_members,
    without_own,
)
from cco_sidecar_plugins.context._parsing import Facts, File, ProjectFiles, remembered, while_unchanged
from cco_sidecar_plugins.context._rare_manifests import rare_dependencies
from cco_sidecar_plugins.context._urls import without_credentials


@hookimpl
def section_files() -> list[str]:
    return [".python-version", *TYPE_BY_MANIFEST]


@hookimpl
def context_section(request: ContextRequest) -> Sections:
    return {"metadata": read_manifests(request.project)}


@remembered
def read_manifests(project: ProjectState) -> tuple[Facts, ProjectFiles]:
    files = ProjectFiles(Path(project.root), [file.path for file in project.files], ALL_MANIFESTS)
    return facts_of(files), files


@while_unchanged
def facts_of(files: ProjectFiles) -> Facts:
    python_version, versions = read_python_version(files), read_dependencies(files)
    return {"dependencies": sorted(versions), "dependency_versions": versions, "python_version": python_version}


ALL_MANIFESTS = 5 * MB  # of which parsing takes half a second; hundreds of modules have a tenth of it


def read_dependencies(files: ProjectFiles) -> Versions:
    """Direct dependencies of the project with the bounds that its manifests give, "" where they give none; of several
    bounds for one name the first manifest's. Blocks.
    """
    parsers: tuple[tuple[str, Callable[[File], Versions]], ...] = (
        ("pyproject.toml", pyproject_dependencies),
        ("setup.cfg", setup_cfg_dependencies),
        ("setup.py", setup_py_dependencies),
        ("requirements.txt", requirements_file),
        ("package.json", package_json_dependencies),
        ("Cargo.toml", cargo_dependencies),
        ("go.mod", go_dependencies),
        ("go.work", go_workspace),
        ("pom.xml", maven_dependencies),
        ("build.gradle", gradle_dependencies),
        ("build.gradle.kts", gradle_dependencies),
        ("settings.gradle", gradle_modules),
        ("settings.gradle.kts", gradle_modules),
        ("Gemfile", gemfile_dependencies),
        ("composer.json", composer_dependencies),
        ("mix.exs", mix_dependencies),
        ("pubspec.yaml", pubspec_dependencies),
        ("build.sbt", sbt_dependencies),
        ("Package.swift", swift_dependencies),
    )
    found = merged((*(files.parsed(name, parse) or {} for name, parse in parsers), rare_dependencies(files)))
    dotnet = dotnet_dependencies(files) if not found or has_solution(files) else {}
    return presentable(merged((found, dotnet)))


def presentable(versions: Versions) -> Versions:
    """``versions`` without credentials, and without names and bounds that no package can have."""
    return {
        name: without_credentials(version) if version.isprintable() and len(version) <= 500 else ""
        for name, version in versions.items()
        if 0 < len(name) <= 214 and name.isprintable()
    }


def bounds(value: Any) -> str:
    """The version that a TOML or JSON value gives: a text, a table with a ``version``, or a list of alternatives."""
    options = value if isinstance(value, list) else [value]
    texts = [option.get("version") if isinstance(option, dict) else option for option in options]
    return " || ".join(dict.fromkeys(text.strip() for text in texts if isinstance(text, str) and text.strip()))


# -- Python


NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
REQUIREMENT = late_pattern(rf"({NAME})\s*(?:\[[^\]]*\])?\s*(.*)")
BOUND = re.compile(r"(~=|===?|!=|<=?|>=?)\s*([\w.*+!-]+)")
INCLUDE = re.compile(r"(?:-([rc])\s*|--(requirement|constraint)[\s=]+)(\S.*)")
EDITABLE = re.compile(r"^(?:-e\s*|--editable[\s=]+)")
EGG = re.compile(rf"#(?:.*&)?egg=({NAME})")
VARIABLE = re.compile(r"(?:[~=!<>]=|[<>]).{0,99}(?:\$\{?\w|%\(\w|\{\{|\{%)")  # in a bound: nobody knows it here


def canonical(name: str) -> str:
    """The name by which a Python package is known, however it is written (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement(line: str) -> tuple[str, str] | None:
    """(name, bounds or "@ URL") of a PEP 508 text, which pip's options may follow; None for anything else. A bound with
    a variable is not known: "".
    """
    text = line.strip()
    match = REQUIREMENT.fullmatch(text) if "\n" not in text else None  # which it would look for again and again
    if not match:
        return None
    name, rest = canonical(match[1]), match[2]
    if rest.startswith("@"):
        if len(rest) > 1000:
            return name, ""
        address = without_credentials(rest[1:].strip()).split(maxsplit=1)
        return (name, f"@ {address[0]}") if address else None
    if VARIABLE.match(rest.lstrip("( ")):
        return name, ""
    rest = re.split(r";|(?:^|\s)--?[A-Za-z]", rest, maxsplit=1)[0].strip()  # markers, and options as --hash
    if rest.startswith("(") and rest.endswith(")"):
        rest = rest[1:-1]
    found = [BOUND.fullmatch(part.strip()) for part in rest.split(",") if part.strip()]
    return None if None in found else (name, ",".join(part[1] + part[2] for part in found if part))


def requirements(file: File, lines: Iterable[Any]) -> Versions:
    """The dependencies that ``lines`` of PEP 508 (or pip's ``-e URL#egg=name``) name; one named twice has both bounds
    as alternatives.
    """
    found: dict[str, list[str]] = {}
    for line in lines:
        text = named(line) if isinstance(line, str) else None
        pair = requirement(text) if text else None
        if pair:
            found.setdefault(pair[0], []).append(pair[1])
        elif text != "" and not isinstance(line, dict):  # {include-group = …}, and all groups are read
            file.odd("a line is no requirement")
    return {name: bounds(versions) for name, versions in found.items()}


def requirements_file(file: File) -> Versions:
    """Of a requirements file and those that it includes from inside the project. Constraints add bounds, no names."""
    found, limits = list[Versions](), list[Versions]()
    waiting, seen = [(file, False)], {file.name}
    while waiting:
        file, is_limit = waiting.pop(0)
        lines = list(requirement_lines(file.text()))
        (limits if is_limit else found).append(requirements(file, (line for line in lines if line[0] != "-")))
        for include in filter(None, map(INCLUDE.match, lines)):
            name = posixpath.normpath(posixpath.join(posixpath.dirname(file.name), include[3].strip("\"' ")))
            if name in seen or "://" in include[3] or len(seen) > 50:
                continue
            seen.add(name)
            if included := file.files.parsed(name, lambda included: included):
                waiting.append((included, is_limit or (include[1] or include[2]).startswith("c")))
    names, bound = merged(found), merged(limits)
    return {name: version or bound.get(name, "") for name, version in names.items()}


def requirement_lines(text: str) -> Iterator[str]:
    """The requirements with names, and the options, of a requirements file, one a line."""
    joined = re.sub(r"(?m)^(?![ \t]*#)(.*)\\\r?\n", r"\1", text)
    for raw in joined.splitlines():
        if line := named(re.split(r"(?:^|\s)#", raw, maxsplit=1)[0]):
            yield line


def named(line: str) -> str:
    """``line`` of pip's, what comes from a URL as ``name @ URL``; "" for a place without a name."""
    line = line.strip()
    place = EDITABLE.sub("", line)
    if "//" in place.partition("@")[0] or place != line:
        if egg := EGG.search(place[:1000]):
            return f"{egg[1]} @ {place}"
        return place if re.match(rf"{NAME}\s*(\[[^\]]*\])?\s*@", place) else ""
    return "" if line.startswith((".", "/")) or re.match(r"[^\s;@]*[/\\]", line) else line


def pyproject_dependencies(file: File) -> Versions:
    data = file.toml()
    project, poetry = file.table(data, "project"), file.table(data, "tool", "poetry")
    groups = [
        project.get("dependencies"),
        *file.table(project, "optional-dependencies").values(),
        *file.table(data, "dependency-groups").values(),
        *file.table(data, "tool", "pdm", "dev-dependencies").values(),
        file.table(data, "tool", "uv").get("dev-dependencies"),
    ]
    dynamic = file.table(data, "tool", "setuptools", "dynamic")
    sources = [dynamic.get("dependencies"), *file.table(dynamic, "optional-dependencies").values()]
    included = [source.get("file") for source in sources if isinstance(source, dict)]
    tables = [
        file.table(poetry, "dependencies"),
        file.table(poetry, "dev-dependencies"),
        *(file.table(poetry, "group", name, "dependencies") for name in file.table(poetry, "group")),
    ]
    found = merged(
        (
            *(requirements(file, as_list(file, group)) for group in groups),
            *(included_files(file, as_list(file, [names] if isinstance(names, str) else names)) for names in included),
            *(merged({canonical(name): bounds(value)} for name, value in table.items()) for table in tables),
        )
    )
    return {name: version for name, version in found.items() if name != "python"}


def as_list(file: File, value: Any) -> list[Any]:
    """The list ``value``; empty where it is missing or null, or (with a line in the log) something else."""
    if value is not None and not isinstance(value, list):
        file.odd("a list of dependencies is none")
    return value if isinstance(value, list) else []


def included_files(file: File, names: Iterable[Any]) -> Versions:
    """Of the requirements files ``names``, relative to the root."""
    read = (file.files.parsed(name.strip(), requirements_file) for name in names if isinstance(name, str))
    return merged(found or {} for found in read)


def setup_cfg_dependencies(file: File) -> Versions:
    config = file.ini()
    values = [config.get("options", name, fallback="") for name in ("install_requires", "install-requires")]
    for section in ("options.extras_require", "options.extras-require"):
        values += [value for _, value in config.items(section)] if config.has_section(section) else []
    return merged(setup_cfg_value(file, value.strip()) for value in values)


def setup_cfg_value(file: File, value: str) -> Versions:
    if value.startswith("file:"):
        return included_files(file, re.split(r"[,\n]", value.removeprefix("file:")))
    has_marker = "'" in value or '"' in value
    lines = value.splitlines() if "\n" in value or has_marker else value.split(";")
    return requirements(file, (line for line in lines if line.strip() and not line.lstrip().startswith("#")))


def read_python_version(files: ProjectFiles) -> str | None:
    """The version that .python-version names, else the lowest that pyproject.toml, setup.cfg or setup.py allow.

    Blocks.
    """
    for name, parse in (
        (".python-version", pinned_python),
        ("pyproject.toml", pyproject_python),
        ("setup.cfg", setup_cfg_python),
        ("setup.py", setup_py_python),
    ):
        if version := files.parsed(name, parse):
            return version
    return None


PINNED = (  # pypy3.10-7.3.12 is Python 3.10; in pypy-7.3.12 and graalpy-24.0 the number is another one
    r"(?:c?python[-@]?|cp|(?:pypy|graalpy)@?)?([23](?:\.\d{1,4})*(?:(?:a|b|rc)\d+|-dev|t)?)(?=$|[-+/@])"
)


def pinned_python(file: File) -> str | None:
    """The first version of a .python-version, as pyenv and uv write it; None for the name of an environment and for the
    version of something else.
    """
    words = [word for line in file.text().splitlines() for word in line.partition("#")[0].split()]
    match = re.match(PINNED, words[0] if words else "")
    return match[1] if match else None


def pyproject_python(file: File) -> str | None:
    data = file.toml()
    project, poetry = file.table(data, "project"), file.table(data, "tool", "poetry", "dependencies")
    return lowest_version(bounds(project.get("requires-python"))) or lowest_version(bounds(poetry.get("python")))


def setup_cfg_python(file: File) -> str | None:
    config = file.ini()
    return lowest_version(
        config.get("options", "python_requires", fallback="") or config.get("options", "python-requires", fallback="")
    )


def setup_py_python(file: File) -> str | None:
    text = literal_text(setup_py_arguments(file).get("python_requires"))
    return lowest_version(text) if text else None


def setup_py_dependencies(file: File) -> Versions:
    given = setup_py_arguments(file)
    extras = given.get("extras_require")
    groups = [given.get("install_requires"), *(extras.values if isinstance(extras, ast.Dict) else [])]
    return merged(requirements(file, literal_lines(file, group)) for group in groups)


def setup_py_arguments(file: File) -> dict[str, ast.expr]:
    """The arguments of ``setup`` by name, else of ``dict`` and what dictionaries have, out of the source, which is not
    run. A variable that the module sets once and nobody changes stands for what it is set to. Raises SyntaxError.
    """
    given, others = dict[str, ast.expr](), dict[str, ast.expr]()
    touched = Counter[str]()
    tree = ast.parse(file.text().removeprefix("\ufeff"))
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in ("setup", "dict"):
                table = given if name == "setup" else others
                table |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            case ast.Dict():
                others |= {literal_text(key): value for key, value in zip(node.keys, node.values, strict=True)}
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(value=ast.Name(id=name)):
                touched[name] += 1
    variables = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if touched[name] == 1:
                variables[name] = value
    fill = Filled(variables)
    return {name: fill.visit(value) for name, value in (others | given).items() if name in SETUP_ARGUMENTS}


SETUP_ARGUMENTS = ("python_requires", "install_requires", "extras_require")


class Filled(ast.NodeTransformer):
    """Puts the values of ``variables`` in the place of their names."""

    def __init__(self, variables: dict[str, ast.expr]) -> None:
        self._variables = variables

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._variables.get(node.id, node)


def literal_text(value: ast.expr | None) -> str:
    """ "" for what is no literal text."""
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def literal_lines(file: File, value: ast.expr | None) -> list[str]:
    """The texts of a literal list, or the lines of a literal text."""
    items = value.elts if isinstance(value, ast.List | ast.Tuple | ast.Set) else [value] if value else []
    if not all(map(literal_text, items)):
        file.odd("a list of dependencies is computed")
    return [line for item in items for line in literal_text(item).splitlines() if line.strip()]


VERSION_BOUND = late_pattern(r"(~=|===?|!=|<=?|>=?|\^|~)?\s*v?(\d{1,4}(?:\.\d{1,4})*(?:(?:a|b|rc)\d{1,4})?)(\.[*x])?")


def lowest_version(wanted: str) -> str | None:
    """The lowest Python that ``wanted`` allows (PEP 440, or Poetry's ^, ~ and ||); None where it has no lower bound."""
    lows = [lowest_of(option) for option in re.split(r"\|\|?", wanted[:500])]
    return None if None in lows else min((low for low in lows if low), key=numbers, default=None)


def lowest_of(option: str) -> str | None:
    found = VERSION_BOUND.findall(option)
    lows = [
        ".".join(version.split(".")[:2]) if sign == ">" else version  # >3.8.0 allows 3.8.1
        for sign, version, _ in found
        if sign not in ("<", "<=", "!=")
    ]
    low = max(lows, key=numbers, default=None)
    series_out = [numbers(version) for sign, version, star in found if sign == "!=" and star]
    while low and (out := next((series for series in series_out if is_of_series(low, series)), None)):
        low = ".".join(map(str, (*out[:-1], out[-1] + 1)))
    return low


def is_of_series(version: str, series: tuple[int, ...]) -> bool:
    """Whether it begins so; 3 is 3.0 as well."""
    return (numbers(version) + (0,) * len(series))[: len(series)] == series


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


# -- other languages


def package_json_dependencies(file: File) -> Versions:
    """The project's own, then those of its workspaces, which are none themselves."""
    places = (file.name, *package_members(file, file.table(file.json())))
    return without_own(file.files.parsed_once(place, package_json) for place in places)


def package_json(file: File) -> tuple[str, Versions]:
    data = file.table(file.json())
    return own_name(data), packages_of(file, data, *NPM)


def own_name(table: dict[str, Any]) -> str:
    """What a package calls itself, "" where it has no name."""
    name = table.get("name")
    return name if isinstance(name, str) else ""


NPM = ("optionalDependencies", "dependencies", "devDependencies", "peerDependencies")  # the first overrides


def composer_dependencies(file: File) -> Versions:
    found = packages_of(file, file.json(), "require", "require-dev")
    return {name: version for name, version in found.items() if "/" in name}  # php and its extensions have none


def packages_of(file: File, data: Any, *sections: str) -> Versions:
    return merged(
        {name: value if isinstance(value, str) else "" for name, value in file.table(data, section).items()}
        for section in sections
    )


def cargo_dependencies(file: File) -> Versions:
    """The project's own, then those of its workspace's members, which are none themselves."""
    workspace = file.table(file.toml(), "workspace")
    shared = file.table(workspace, "dependencies")
    places = (file.name, *crate_members(file, workspace))
    read = (file.files.parsed_once(place, crate, shared) for place in places)
    return without_own((*read, ("", crates(shared, {}))))


def crate_members(file: File, workspace: dict[str, Any]) -> list[str]:
    """Those that ``members`` names, or matches and ``exclude`` does not name, nor a folder above them."""
    listed = texts_of(workspace.get("members"))
    without = [pattern for folder in texts_of(workspace.get("exclude")) for pattern in (folder, f"{folder}/**")]
    named = [text for text in listed if not re.search(r"[*?[]", text)]
    return [*members(file, named), *members(file, listed, without)]


def crate(file: File, shared: dict[str, Any]) -> tuple[str, Versions]:
    data = file.toml()
    places = [data, *(file.table(data, "target", target) for target in file.table(data, "target"))]
    kinds = ("dependencies", "dev-dependencies", "dev_dependencies", "build-dependencies", "build_dependencies")
    found = merged(crates(file.table(place, kind), shared) for kind in kinds for place in places)
    return own_name(file.table(data, "package")), found


def crates(table: dict[str, Any], shared: dict[str, Any]) -> Versions:
    """By the names under which the crates are published, which a table may rename."""
    found = {}
    for name, value in table.items():
        if isinstance(value, dict) and value.get("workspace") is True:
            value = shared.get(name)
        package = value.get("package") if isinstance(value, dict) else None
        found[package if isinstance(package, str) else name] = bounds(value)
    return found


MIX = late_pattern(  # a dependency, not an application of the same umbrella
    r"""\{\s*:"?(\w+)"?\s*,\s*(?:"([^"\n]*)"|(?:\[\s*)?(?!in_umbrella)[a-z_]+:[^:]|[a-z_]+\()"""
)


def mix_dependencies(file: File) -> Versions:
    """The project's own, and those of an umbrella's applications."""
    return merged(file.files.parsed_once(name, mix_file) or {} for name in (file.name, *umbrella_members(file)))


def mix_file(file: File) -> Versions:
    """The tuples in functions whose names speak of ``deps``; the file is not run."""
    lines, inside = list[str](), False
    for line in file.text().splitlines():
        if function := re.match(r"\s*defp?\s+(\w+)", line):
            inside = "deps" in function[1]
        if inside:
            lines.append(re.sub(r"(^|\s)#(?!\{).*", "", line))
    found: Versions = {}
    for name, version in MIX.findall("\n".join(lines)):
        found.setdefault(name, version)
    return found


# a Ruby text
QUOTED = r"""(?:"[^"\n]*"|'[^'\n]*'|%[qQ]?(?:\([^)\n]*\)|\[[^]\n]*\]|\{[^}\n]*\}|<[^>\n]*>|\|[^|\n]*\||![^!\n]*!))"""
GEM = late_pattern(
    rf"(?m)(?:^|[;{{]|\bdo\b)[ \t]*gem[ \t]*\(?\s*(:\w+\b|:?{QUOTED})(?!\s*=>)((?:\s*,\s*\[?\s*{QUOTED}(?!\s*=>))*)"
)


def gemfile_dependencies(file: File) -> Versions:
    text = re.sub(r"(?ms)^=begin\b.*?(?:^=end\b|\Z)", "", file.text())
    text = re.split(r"(?m)^__END__\r?$", text, maxsplit=1)[0]
    text = re.sub(r"(?m)^[ \t]*#.*$|\s#\s.*$", "", text)
    found: Versions = {}
    for quoted, rest in GEM.findall(text):
        name = quoted[1:] if re.fullmatch(r":\w+", quoted) else ruby_text(quoted.removeprefix(":"))
        limits = [ruby_text(limit) for limit in re.findall(QUOTED, rest)]
        if re.fullmatch(r"[\w.-]+", name):
            found.setdefault(name, ", ".join(limit for limit in limits if limit and "#{" not in limit))
    return found


def ruby_text(quoted: str) -> str:
    """The text between a Ruby literal's quotes."""
    return re.sub(r"\A%[qQ]?", "", quoted)[1:-1]
