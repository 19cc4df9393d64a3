"""What a terminal shows of a text that somebody else wrote.

Of cco_sidecar: what does not say so counts as the repository's own where the plugins are copied into one.
"""

from __future__ import annotations

from cco_sidecar_plugins._patterns import late_pattern

ESCAPES = late_pattern(  # ECMA-48: control sequences, operating system commands, control strings, and the short ones
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|[ -/]*[0-~])"
)


def printable(text: str) -> str:
    """The text with blanks for all that is not printable: nothing in it steers the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def plain(text: str) -> str:
    """The text without its escape sequences."""
    return printable(ESCAPES.sub("", text))


def last_shown(line: str) -> str:
    """What a terminal shows of a line of output in the end: carriage returns replace what came before them."""
    return printable(ESCAPES.sub("", line).rstrip("\r").rpartition("\r")[2])
