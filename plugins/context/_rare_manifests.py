"""Dependencies out of the manifests of languages from Ada to Zig, of Ansible, Bazel, Helm, Nix and Terraform, for the
plugin metadata of cco_sidecar. No manifest is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import takewhile

from cco_sidecar_plugins._patterns import late_pattern
from cco_sidecar_plugins.context._manifests import pubspec_block
from cco_sidecar_plugins.context._modules import Versions, merged, yaml_block
from cco_sidecar_plugins.context._parsing import File, ProjectFiles


def rare_dependencies(files: ProjectFiles) -> Versions:
    """Those of the manifests in the root and of Ansible's in their folders, of which some are packages themselves."""
    named = [(name, parse) for end, parse in BY_ENDING.items() for name in files.ending_with(end) if "/" not in name]
    found = merged(files.parsed(name, parse) or {} for name, parse in (*BY_NAME.items(), *named))
    return {name: version for name, version in found.items() if f"{name}.opam" not in dict(named)}


def toml_dependencies(file: File) -> Versions:
    """Of fpm.toml, or of Alire's, whose dependencies are a list of tables."""
    data = file.toml()
    tables = data["depends-on"] if isinstance(data.get("depends-on"), list) else []
    tables += [file.table(data, name) for name in ("dependencies", "dev-dependencies")]
    return merged({name: text(value) for name, value in file.table(table).items()} for table in tables)


def text(value: object) -> str:
    return value if isinstance(value, str) else ""


def julia_dependencies(file: File) -> Versions:
    data = file.toml()
    bounds = file.table(data, "compat")
    return {name: text(bounds.get(name)) for name in file.table(data, "deps")}


def elm_dependencies(file: File) -> Versions:
    """Of a package, or the direct ones of an application."""
    data = file.json()
    tables = [file.table(data, name) for name in ("dependencies", "test-dependencies")]
    tables = [file.table(table, "direct") if "direct" in table else table for table in tables]
    return merged({name: text(value) for name, value in table.items()} for table in tables)


def crystal_dependencies(file: File) -> Versions:
    blocks = (yaml_block(file.text(), key) for key in ("dependencies", "development_dependencies"))
    return merged(map(pubspec_block, blocks))


def helm_dependencies(file: File) -> Versions:
    block = "\n".join(yaml_block(file.text(), "dependencies"))
    first = re.search(r"(?m)^([ \t]{0,99})- ", block)
    items = re.split(rf"(?m)^{first[1]}- ", block)[1:] if first else []  # an item may have lists of its own
    found = [dict(re.findall(r"(?m)^[ \t]*(name|version):[ \t]*[\"']?([^\"'#\n]+)", item)[::-1]) for item in items]
    return {item["name"].strip(): item.get("version", "").strip() for item in found if "name" in item}


def r_dependencies(file: File) -> Versions:
    fields = dict(re.findall(r"(?m)^(Depends|Imports|LinkingTo|Suggests):(.*(?:\n[ \t].*)*)", file.text()))
    found = R_ITEM.findall(",".join(fields.values()))
    return {name: version.strip() for name, version in found if name != "R"}


R_ITEM = late_pattern(r"(?<![^,])\s*+([\w.]++)\s*+(?:\(([^,\n]*)\)\s*+)?(?![^,])")


def cabal_dependencies(file: File) -> Versions:
    code = re.sub(r"(?m)^[ \t]*--.*\n?", "", file.text())
    own = re.search(r"(?mi)^name:[ \t]*([\w-]+)", code)
    found, item_of = Versions(), re.compile(r"\s*([A-Za-z0-9-]+)(?::\S+)?\s*(.*)").match
    for field in CABAL.finditer(code):
        for item in re.sub(r":[ \t]*\{[^{}]*\}", "", field[2]).split(","):  # libraries of one package
            if match := item_of(item):
                found.setdefault(match[1], match[2].strip())
    return {name: version for name, version in found.items() if not own or name != own[1]}


# a field has the lines that are deeper than it, and the blank ones between them
CABAL = late_pattern(r"(?mi)^([ \t]{0,40})build-depends:([^\n]*(?:(?:[ \t\r]*+\n)++\1[ \t][^\n]*+)*+)")


def opam_dependencies(file: File) -> Versions:
    after = re.split(r"(?m)^depends:\s*\[", file.text(), maxsplit=1)[1:]
    parts = (part[0] for part in OPAM_PART.finditer(after[0])) if after else ()
    listed = "".join(part for part in takewhile("]".__ne__, parts) if not part.startswith(("#", "(*")))
    names = re.findall(r'"([\w+-]+)"\s*(?:\{([^}]*))?|\{[^}]*', listed)
    return {name: " ".join(OPAM_BOUND.findall(bounds)).replace('"', "") for name, bounds in names if name}


# a string or a comment without an end has all that follows, so nothing is looked at twice
OPAM_PART = late_pattern(r"""(?s)(?:[^]"#(]++|\((?!\*)|"(?:[^"\\]++|\\.)*+"?)++|#[^\n]*|\(\*.*?(?:\*\)|\Z)|\]""")
OPAM_BOUND = late_pattern(r'(?<![<>=!])[<>=!]++ *+"[^"]*"')


def terraform_dependencies(file: File) -> Versions:
    blocks = re.findall(r"=\s{0,9}\{([^{}]{0,999})", file.text())
    fields = re.compile(r'(?m)(?:^|,)[ \t]{0,99}(source|version)\s{0,9}=\s{0,9}"([^"\n]{1,99})"')
    found = [dict(fields.findall(block)) for block in blocks]
    return {each["source"]: each.get("version", "") for each in found if "source" in each}


def rebar_dependencies(file: File) -> Versions:
    """Each ``name``, ``{name, "version"}`` or ``{name, {git, ...}}`` of the lists of deps, those of profiles too."""
    found = Versions()
    for after in re.split(r"\{\s{0,9}deps\s{0,9},\s{0,9}\[", re.sub(r"%[^\n]*", "", file.text()))[1:]:
        depth, name = 0, ""
        for token in ERLANG_TOKEN.findall(after.partition("]")[0]):
            if token in "{}":
                depth, name = depth + (1 if token == "{" else -1), name if depth else ""
            elif token[0] != '"':
                if depth == 0 or (depth == 1 and not name):
                    name = token
                    found.setdefault(name, "")
            elif depth == 1 and name:
                found[name] = found[name] or token.strip('"')
    return found


ERLANG_TOKEN = late_pattern(r'[{}]|"[^"\n]*"|[a-z][\w@]*')


def nimble_dependencies(file: File) -> Versions:
    """Without the compiler."""
    texts = (text for call in NIMBLE_CALL.findall(file.text()) for text in re.findall(r'"([^"\n]+)"', call))
    items = (item for text in texts for item in text.split(","))  # an older form
    found = [item.strip() for item in items]
    named = [(re.split(r"[\s<>=~^#@]", item, maxsplit=1)[0], item) for item in found]
    bounds = {name.rpartition("/")[2]: item[len(name) :].strip() for name, item in named}
    return {name: bound for name, bound in bounds.items() if name not in ("", "nim")}


NIMBLE_CALL = late_pattern(r"""(?m)^[ \t]*+requires\b[ \t:(]*+((?:"[^"\n]{1,999}"\s*+,?\s*+)++)""")


def ansible_dependencies(file: File) -> Versions:
    """The roles and collections of Ansible Galaxy, each an item with fields or its name alone."""
    found = Versions()
    for item in re.split(r"(?m)^[ \t]{0,99}-[ \t]", file.text())[1:]:
        fields = dict(ANSIBLE_FIELD.findall(item)[::-1])
        alone = re.match(r"[\w.-]+(?=[ \t\r]*(?:#|\n|\Z))", item)
        if name := fields.get("name") or fields.get("src") or (alone[0] if alone else ""):
            found.setdefault(name.strip(), fields.get("version", "").strip())
    return found


ANSIBLE_FIELD = late_pattern(r"(?m)^[ \t]*+(name|src|version):[ \t]*+[\"']?([^\"'#\n]++)")


def written(pattern: str) -> Callable[[File], Versions]:
    """Reads what a pattern finds: the name, and the version or nothing."""
    compiled = late_pattern(pattern)
    return lambda file: {name.strip('@"'): version for name, version in compiled.findall(file.text())}


BY_NAME = {
    "DESCRIPTION": r_dependencies, "Project.toml": julia_dependencies, "fpm.toml": toml_dependencies,
    "alire.toml": toml_dependencies, "shard.yml": crystal_dependencies, "elm.json": elm_dependencies,
    "Chart.yaml": helm_dependencies,
    "build.zig.zon": written(r'\.(@"[^"\n]{1,99}"|\w{1,99})\s*+=\s*+\.\{(?=[^{}]{0,999}\.(?:url|path)\s{0,9}=)()'),
    "cpanfile": written(
        r"""(?m)^[ \t]{0,99}requires\s{1,9}["']([\w:]{1,99})["']"""
        r"""(?:\s{0,9}(?:,|=>)\s{0,9}(?:["'](?=[^"'\n]))?((?<=["'])[^"'\n]{1,99}|v?\d[\w.]{0,99}))?"""
    ),
    "project.clj": written(r'\[([\w./-]{1,99})\s{1,9}"([^"\n]{1,99})"'),
    "deps.edn": written(r'(?<![\w./-])([\w./-]{1,99}+)\s{1,9}\{:mvn/version\s{1,9}"([^"\n]{1,99})"'),
    "versions.tf": terraform_dependencies,
    "rebar.config": rebar_dependencies,
    "MODULE.bazel": written(
        r'(?m)^[ \t]{0,99}bazel_dep\(\s{0,99}name\s{0,9}=\s{0,9}"([^"\n]{1,99})"'
        r'(?:\s{0,9},\s{0,99}version\s{0,9}=\s{0,9}"([^"\n]{1,99})")?'
    ),
    "flake.nix": written(
        r"(?<!#)(?<!# )(?<![\w.-])(?:inputs\.)?+([\w-]{1,99}+)"
        r'(?:\.url|\s{0,9}=\s{0,9}\{\s{0,99}url)\s{0,9}=\s{0,9}"([^"\n]{1,299})"'
    ),
    **dict.fromkeys([f"{folder}requirements.yml" for folder in ("", "roles/", "collections/")], ansible_dependencies),
}  # fmt: skip
BY_ENDING = {".cabal": cabal_dependencies, ".opam": opam_dependencies, ".nimble": nimble_dependencies}
