"""What the name of an agent type says of the languages that it writes, for the plugins of cco_sidecar."""

from __future__ import annotations

WEB = ("javascript", "typescript", "vue", "svelte", "astro")
SPOKEN_BY = {  # the first word of an agent's type -> the languages that it writes; agents not named here write any
    **{name: (name,) for name in "python rust go ruby php perl elixir erlang haskell clojure lua r julia dart".split()},
    **{name: (name,) for name in "ada cobol crystal elm fortran lisp nim nix ocaml pascal solidity vhdl zig".split()},
    **dict.fromkeys(("javascript", "typescript", "nodejs"), WEB),
    **dict.fromkeys(("react", "vue", "angular", "svelte", "nextjs", "frontend"), (*WEB, "html", "css", "elm")),
    **dict.fromkeys(("django", "flask"), ("python", "html")), "fastapi": ("python",), "rails": ("ruby", "html"),
    "elixir": ("elixir", "html"), "laravel": ("php", "html"),  # a Phoenix view is HTML too
    "flutter": ("dart",),
    "java": ("java", "kotlin"), "spring": ("java", "kotlin"), "kotlin": ("kotlin", "java"), "scala": ("scala", "java"),
    "csharp": ("csharp", "html"), "dotnet": ("csharp", "fsharp", "html"), "fsharp": ("fsharp",),
    "c": ("c", "cpp"), "cpp": ("cpp", "c"), "swift": ("swift", "c"),
    "objective": ("objectivec", "c", "cpp"),
    "shell": ("shell",), "powershell": ("powershell",), "sql": ("sql",), "html": ("html", "css"),
    "terraform": ("terraform",),
}  # fmt: skip
ANY_LANGUAGE = frozenset(language for languages in SPOKEN_BY.values() for language in languages)


def spoken_by(agent_type: str) -> tuple[str, ...]:
    """The languages that an agent of the type writes; none where it writes any."""
    return SPOKEN_BY.get(agent_type.partition("-")[0], ())
