"""What a file of source defines and imports, by patterns a language, for the plugin relevance of cco_sidecar."""

from __future__ import annotations

import collections
import re

from cco_sidecar_plugins.context._languages import WEB

START = r"^[ \t]*(?:export[ \t]+)?(?:default[ \t]+)?(?:declare[ \t]+)?(?:abstract[ \t]+)?(?:async[ \t]+)?"
RUST_START = r"^[ \t]*(?:pub(?:\([^)\n]*\))?[ \t]+)?"
CLASS_WORDS = (
    "class|interface|enum|record|object|trait|struct|protocol|extension|fun|func|function|def|namespace|typealias"
)
MODIFIERS = "public|private|protected|internal|static|final|override|abstract|async|virtual|synchronized"
METHOD_START = r"^[ \t]+(?:(?:static|async|get|set|public|private|protected|readonly)[ \t]+)*"
DEFINITIONS = {  # by family, of lines; compiled when they are needed
    "python": [r"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)", r"^([A-Za-z_]\w*)[ \t]*(?::[^=\n]+)?=(?!=)"],
    "ruby": [
        r"^[ \t]*(?:def[ \t]+(?:self\.)?|class[ \t]+|module[ \t]+)([\w:]+)",
        r"^[ \t]*(?:attr_\w+|scope)[ \t]+:(\w+)", r"^[ \t]*([A-Z]\w*)[ \t]*=",
    ],
    "go": [r"^func[ \t]+(?:\([^)\n]*\)[ \t]*)?(\w+)", r"^(?:type|var|const)[ \t]+(\w+)",
        r"^\t(\w+)[ \t]+(?:struct|interface)\b"],
    "rust": [
        RUST_START + r"(?:(?:default|async|unsafe|const|extern[ \t]+\"C\")[ \t]+)*"
        r"(?:fn|struct|enum|trait|mod|type|const|static)[ \t]+(\w+)",
        r"^[ \t]*macro_rules![ \t]*(\w+)",
    ],
    "web": [
        START + r"(?:function\*?|class|interface|type|enum|namespace)[ \t]+(\w+)",
        r"^(?:export[ \t]+)?(?:const|let|var)[ \t]+(\w+)",
        r"^[ \t]+(?:const|let|var)[ \t]+(\w+)[ \t]*=[ \t]*"
        r"(?:async[ \t]*)?(?:function|\([^)\n]*\)[ \t]*(?::[^=\n]+)?=>|\w+[ \t]*=>)",
        METHOD_START + r"(?!(?:if|for|while|switch|catch|function|return)\b)(\w+)[ \t]*\([^()\n]*\)[^;\n]*\{$",
    ],
    "classes": [
        rf"^[ \t]*(?:[\w@]+[ \t]+){{0,6}}?(?:{CLASS_WORDS})[ \t]+(\w+)",
        rf"^[ \t]+(?:(?:{MODIFIERS})[ \t]+)+[\w<>\[\],.?]+[ \t]+(\w+)[ \t]*\(",
    ],
    "c": [
        r"^[A-Za-z_][\w \t*&:<>,~]*?[ \t*&:](~?\w+)[ \t]*\([^;\n]*$",
        r"^[ \t]*(?:typedef[ \t]+)?(?:struct|enum|union|class|namespace)[ \t]+(\w+)",
        r"^[ \t]*#[ \t]*define[ \t]+(\w+)",
    ],
    "any": [
        r"^[ \t]*(?:local[ \t]+)?(?:defp?|defmodule|defmacro|function|sub|package"
        r"|fn|func|class|module|proc|message|service)[ \t]+([\w.:]+)",
    ],
    "other": [  # in small letters and in capitals
        r"(?i)^[ \t]*(?:(?:pure|elemental|recursive|abstract|local|pub|overriding|static|virtual|automatic)[ \t]+)*+"
        r"(?:def|function|subroutine|program|module|procedure|package(?:[ \t]+body)?|task|entity|contract|library"
        r"|interface|event|modifier|struct|class_name|class|func|signal|proc|macro|port|@implementation|@protocol"
        r"|(?:program|function)-id\.)[ \t]+[\"']?(\w+(?:[.:-]\w+)*)",
        r"^(?:let(?:[ \t]+rec)?|and|val|type|external|exception|\(def\w+)[ \t]+(?:alias[ \t]+)?(\w[\w'-]*)",
    ],
}  # fmt: skip
IMPORTS = {  # by family, of lines; compiled when they are needed
    "python": [r"^[ \t]*from[ \t]+([.\w]+)[ \t]+import[ \t]+\(?([\w, \t]*)", r"^[ \t]*import[ \t]+([\w.]+)()"],
    "ruby": [r"^[ \t]*require(?:_relative)?[ \t(]+[\"']([^\"'\n]+)()"],
    "go": [r"^(?:import)?[ \t]+(?:[\w.]+[ \t]+)?\"([\w./-]+)\"()"],
    "rust": [RUST_START + r"use[ \t]+([\w:]+)()", RUST_START + r"mod[ \t]+(\w+);()"],
    "web": [r"(?:\bfrom|\bimport|\brequire|\bexport)[ \t(]*[\"']([^\"'\n]+)[\"']()"],
    "classes": [r"^[ \t]*(?:import|using|use)[ \t]+(?:static[ \t]+)?([\w.\\]+)()"],
    "c": [r"^[ \t]*#[ \t]*include[ \t]*[<\"]([^>\"\n]+)()"],
    "any": [],
}  # fmt: skip
FAMILIES = {
    **{name: name for name in ("python", "ruby", "go", "rust")}, **dict.fromkeys(WEB, "web"),
    **dict.fromkeys(("c", "cpp"), "c"),
    **dict.fromkeys(("java", "kotlin", "scala", "csharp", "swift", "php", "dart"), "classes"),
    **dict.fromkeys(
        "perl elixir erlang haskell clojure lua r julia shell powershell sql zig nim protobuf graphql".split(), "any"
    ),
    **dict.fromkeys(
        """ada assembly cobol crystal d elm fortran gdscript groovy lisp objectivec ocaml pascal solidity starlark tcl
        verilog vhdl""".split(),
        "other",
    ),
}  # fmt: skip


def definitions(language: str, text: str) -> collections.Counter[str]:
    """The names that a file defines, as written, and how often."""
    return collections.Counter(
        name
        for pattern in DEFINITIONS.get(FAMILIES.get(language, ""), ())
        for name in re.findall(pattern, text, re.MULTILINE)
    )


def imports(language: str, text: str) -> list[str]:
    """What a file imports, as paths without endings; relative ones begin with a dot."""
    family = FAMILIES.get(language, "")
    found: dict[str, None] = {}
    for pattern in IMPORTS.get(family, ()):
        for module, names in re.findall(pattern, text, re.MULTILINE):
            module = import_path(family, module)
            found[module] = None
            for name in names.replace(",", " ").split()[:20]:  # from package import module
                found[f"{module}/{name}"] = None
    return [module for module in found if module.strip("./")][:200]


def import_path(family: str, module: str) -> str:
    if family == "python":
        bare = module.lstrip(".")
        dots = len(module) - len(bare)
        return ("./" + "../" * (dots - 1) if dots else "") + bare.replace(".", "/")
    if family == "rust":
        return module.replace("crate::", "").replace("self::", "").replace("super::", "").replace("::", "/")
    if family == "classes":
        return module.replace("\\", "/").replace(".", "/")
    return re.sub(r"\.(js|mjs|cjs|jsx|ts|mts|cts|tsx|vue|svelte|h|hpp|hh|rb)$", "", module)
