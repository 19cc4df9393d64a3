"""What may have been meant by a word that is not known, and the plural of one that is.

Of cco_sidecar: what does not say so counts as the repository's own where the plugins are copied into one.
"""

from __future__ import annotations

from collections.abc import Iterable


def meant(word: str, names: Iterable[str]) -> str:
    """The end of a message that refuses ``word``: the nearest name, else all names where they are fewer than ten."""
    names = sorted(names)
    return did_you_mean(word, names) or (f"; there are {', '.join(names)}" if len(names) < 10 else "")


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The end of a message that refuses ``word``: the nearest name, "" where none is near."""
    close = nearest(word, names)
    return f", did you mean {close}?" if close else ""


def nearest(word: str, names: Iterable[str]) -> str:
    """The one of ``names`` that is nearest to ``word``; "" where none is near."""
    import difflib  # here alone: nothing else at the start needs it

    plain = {name.lstrip("-").lower(): name for name in names}
    word = word.lstrip("-").lower()
    same_letters = [name for name in plain if sorted(name) == sorted(word)]
    close = same_letters or difflib.get_close_matches(word, plain, 1, 0.75)
    alike = [name for name in plain if name[:1] == word[:1]]  # of a few letters three are often the same by chance
    close = close or difflib.get_close_matches(word, alike, 1, 0.65)
    close = close or [name for name in plain if word and name.startswith(word)]
    return plain[close[0]] if close else ""


def counted(number: int, what: str) -> str:
    """For example "1 file", "2 files"."""
    return f"{number} {what}{'' if number == 1 else 's'}"
