"""URLs without what lets somebody in, also in other forms than the standard's, for plugins of cco_sidecar."""

from __future__ import annotations

import re

from cco_sidecar_plugins._patterns import late_pattern


def without_credentials(text: str) -> str:
    """``text``, where it is a URL or scp's form of one, without user name, password and parameters. A password may hold
    any sign, so that all goes up to the last @ that may end it, even where that is a part of the path. What is too long
    to be a URL is left out.
    """
    if len(text) > 4_000:
        return ""
    if NO_URL.match(text):
        return text
    for form in USER_INFO:
        text = form.sub(r"\1", text)
    return re.sub(r"[?;&][^#]*|#.*=.*", "", text) if re.match(r"[\w+.-]*:?/|.*://", text) else text


NO_URL = late_pattern(r"[.~]|/(?!/)|(?:file:(?!//[^/])|link:|portal:|patch:|npm:|workspace:)[^?]*$")
AUTHORITY = r"((?:^|:)//+|^[\w+.-]+:/+)"
USER_INFO = [
    late_pattern(form, re.DOTALL)
    for form in (
        AUTHORITY
        + r"(?:[^/?#@:\[]*@)?+(?:\[[\da-fA-F:.]+\])?+(?>[^/?#]*?:(?!\d*(?:[/?#]|$))).*(?<!\.git)@",  # no port follows
        AUTHORITY + r"[^/]*@",
        AUTHORITY
        + r"(?!localhost\b)[\w+=-]+(?::\d+|(?=.*@[^@]*/))[/?#].*(?<!/)(?<!\.git)@",  # no domain: half a password
        r"^()(?![\w+.-]+:/)[^/:]*:.+@(?=[^@]*[:/])",
    )
]
