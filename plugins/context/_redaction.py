"""Tells secrets from code, placeholders and addresses, by documented forms and by what surrounds a text.

tests/benchmarks/redaction.py measures it.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from cco_sidecar import SECRET_NAME, SECRETS, SHORTEST, Redaction, T, without_secrets
from cco_sidecar_plugins._patterns import late_pattern


class MeasuredRedaction(Redaction):
    """Remembers which texts hold no secret: contexts name the same files again and again."""

    MOST = 10_000  # texts, by 16 bytes each
    LARGE = 10_000  # bytes of JSON's texts that are remembered as a whole: a project's names, say
    clean: ClassVar[dict[bytes, None]] = {}
    lock = threading.Lock()

    def redact(self, content: str) -> tuple[str, int]:
        mark = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if mark in self.clean:
            return content, 0
        redacted, number = self._redact(content)
        if not number:
            self._remember(mark)
        return redacted, number

    def redact_json(self, value: Any) -> tuple[Any, int]:
        content = msgspec.json.encode(value)
        large = len(content) >= self.LARGE
        mark = hashlib.blake2b(content, digest_size=16, person=b"JSON").digest() if large else b""
        if mark in self.clean:
            return value, 0
        pieces = pieces_of(content)
        texts = msgspec.json.decode(texts_of(pieces), type=list[str])
        given = given_to_secrets(pieces, texts) if has_secret_field(pieces) else ()
        names, number = dict(self.suspects(((at, name), f'{name} = "{texts[at]}"') for at, name in given)), 0
        for at in names.keys() | set(self.suspects(enumerate(texts))):
            redacted, found = self.redact_given(texts[at], names[at]) if at in names else self.redact(texts[at])
            if found:
                pieces[2 * at + 1], number = msgspec.json.encode(redacted)[1:-1], number + found
        if number:
            value = msgspec.json.decode(unescaped(b'"'.join(pieces)))
        elif large:
            self._remember(mark)
        return value, number

    def suspects(self, texts: Iterable[tuple[T, str]]) -> Iterator[T]:
        """The keys of those texts that may hold a secret. One by one millions of short ones would take minutes."""
        left = iter(texts)
        while some := list(itertools.islice(left, 1000)):  # one search of all would hold up all threads
            whole = [text.replace("\0", "\1") for _, text in some]
            redacted, number = self.redact(APART.join(whole))
            if number:
                parts = zip(some, redacted.split(APART), whole, strict=True)
                yield from (key for (key, _), is_, was in parts if is_ != was)

    def _remember(self, mark: bytes) -> None:
        with self.lock:
            self.clean[mark] = None
            if len(self.clean) > self.MOST:
                del self.clean[next(iter(self.clean))]  # the oldest

    def _redact(self, content: str) -> tuple[str, int]:
        number, groups = 0, (hints for pattern, hints in secret_hints() if pattern.search(content))
        there = {hint for hints in groups for hint in hints if hint in content}
        for form in SECRET_FORMS:
            if not form.hints or not there.isdisjoint(form.hints):
                content, found = form.redact(content)
                number += found
        return content, number


def pieces_of(content: bytes) -> list[bytes]:
    """JSON at its quotes: every second piece is a text or a field's name, between them is what parts them. A pattern
    that looks for the ends of texts takes three times as long.
    """
    # Two bytes that no JSON has stand for what is escaped, so that each quote begins or ends a text.
    return content.replace(b"\\\\", b"\0").replace(b'\\"', b"\1").split(b'"')


def texts_of(pieces: list[bytes]) -> bytes:
    """A JSON list of the texts, names of fields too."""
    return unescaped(b'["%b"]' % b'","'.join(pieces[1::2]))


def unescaped(content: bytes) -> bytes:
    """What ``pieces_of`` has put another byte for, put back."""
    return content.replace(b"\1", b'\\"').replace(b"\0", b"\\\\")


# A form may go on to a line's end. Beyond a zero byte goes none but a PuTTY key, of which no line begins so, and the
# password of a machine, which comes one word after the login.
APART = "\nPuTTY\0\n\0\n"


def has_secret_field(pieces: list[bytes]) -> bool:
    """Whether a text, or a list, is in a field whose name tells of a secret."""
    named = zip(pieces[1::2], pieces[2::2], strict=True)
    names = b"\n".join([text for text, after in named if after == b":" or after[:2] == b":["]).lower()
    return SECRET_FIELD.search(names) is not None


def given_to_secrets(pieces: list[bytes], texts: list[str]) -> Iterator[tuple[int, str]]:
    """(place, name of the field) of each text in a field whose name tells of a secret."""
    name = ""
    for at, (text, after) in enumerate(zip(texts, pieces[2::2], strict=True)):
        if after[:1] == b":":
            name = text[-80:] if SECRET_NAME.search(text[-80:]) else ""
        elif name and len(text) >= SHORTEST:
            yield at, name


# Of names in small letters: to search without regard to them takes ten times as long.
SECRET_FIELD = late_pattern(SECRET_NAME.pattern.replace("(?i:", "(?:").encode())


class SecretForm(Struct, frozen=True):
    """A form of secret that its issuer documents, or that its surroundings give away. Patterns are bounded: no text may
    make them slow.

    ``hints``: each hit holds one of these texts; no hints: it may hold any. Where the pattern has a group, only that is
    the secret, and ``looks_real`` may still say that it is a placeholder.
    """

    name: str
    hints: tuple[str, ...]
    pattern: str
    looks_real: Callable[[re.Match[str]], bool] = bool

    def redact(self, content: str) -> tuple[str, int]:
        return without_secrets(content, compiled(self.pattern), self.looks_real)


compiled = functools.cache(re.compile)  # when first needed: all take 20 ms, and most are never met


PLACEHOLDERS = late_pattern(
    r"(?i)(?:my|your|the|a|some|test|new|old|db|user|admin|root)?[_.-]?"
    r"(?:p|pw|pass|passw|password|passwd|passphrase|pwd|secret|token|key|api[_-]?key|user|username|example|changeme"
    r"|postgres|mysql|guest|foo|bar|baz|test|redacted|hunter2|.{1,2}|(.)\1*)[_-]?(?:here|word|123|1|2)?"
)
CALLS_ITSELF_SECRET = late_pattern(
    r"(?i)(?:secret|token|passw(?:or)?d|(?:api|access|auth|account)[_-]?key|credential)\w*[\"'\])]*\s*$"
)
# of those that call themselves secret
NAME_ENDS = "(?:ken|KEN|[Kk]ey|KEY|ret|RET|ord|ORD|als|ALS|[Pp]wd|PWD|swd|SWD|ial|IAL|ase|ASE)"
STANDS_FOR_A_SECRET = late_pattern(
    r"(?i)[{}<>*\[\]()]|\$[a-z_({]|%(?![0-9a-f]{2})|\.\.\.|x{4}|example|placeholder|redacted"
)


def is_no_placeholder(match: re.Match[str]) -> bool:
    """Whether the password in a URL is one, and not a word or a variable that stands for one."""
    first = match[1].partition("@")[0]
    return not PLACEHOLDERS.fullmatch(match[1]) and not (
        (PLACEHOLDERS.fullmatch(first) and len(first) > 2) or STANDS_FOR_A_SECRET.search(first)
    )


def is_made_up(match: re.Match[str]) -> bool:
    """Whether a text that is passed as a secret has letters and digits, and is no variable, call or placeholder."""
    text = match[1]
    return kinds_of_signs(text) >= 2 and bool(re.search("[0-9]", text)) and not STANDS_FOR_A_SECRET.search(text)


def is_option(match: re.Match[str]) -> bool:
    """Whether what a text is given to is an option of a program."""
    return re.search(r"--[\w-]*$", match.string[max(0, match.start() - 32) : match.start()]) is not None


def kinds_of_signs(text: str) -> int:
    return sum(bool(re.search(kind, text)) for kind in ("[a-z]", "[A-Z]", "[0-9]"))


def looks_random(text: str) -> bool:
    is_hex = len(text) >= 32 and re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", text) is not None
    if not is_hex and (kinds_of_signs(text) < 3 or "EXAMPLE" in text):
        return False
    entropy = -sum(n / len(text) * math.log2(n / len(text)) for n in collections.Counter(text).values())
    return entropy >= (3.2 if is_hex else 4.0)


def is_assigned_to_a_secret(match: re.Match[str]) -> bool:
    """Whether a text that may be a secret is given to what calls itself one."""
    text, before = match[match.lastindex or 0], match.string[max(0, match.start() - 60) : match.start()]
    # Without quotes it may also be a name of code, in which letters and digits seldom meet.
    if not match[1] and len(re.findall(r"[A-Za-z](?=\d)|\d(?=[A-Za-z])", text)) < 4:
        return False
    if CALLS_ITSELF_SECRET.search(before) and looks_random(text):
        return True
    if not IS_CALLED_SECRET.search(before) or not re.search("[0-9]", text) or STANDS_FOR_A_SECRET.search(text):
        return False
    return not (WORDS.fullmatch(text) if match[1] else NUMBER_OR_PLACE.search(text))


IS_CALLED_SECRET = late_pattern(SECRET_NAME.pattern + r"s?[\"'\])]*\s*$")
WORDS = late_pattern(
    r"[/.]?(?:[A-Za-z]+\d{0,2}|\d{0,8})(?:[_./-](?:[A-Za-z]+\d{0,2}|\d{0,8}))+"  # no text is read in two ways
)  # claude-3-5-sonnet-20241022
NUMBER_OR_PLACE = re.compile(r"^[0-9a-fA-F-]+$|[./]")


SECRET_FORMS = tuple(
    SecretForm(name, tuple(hints.split("|")) if hints else (), pattern, *more)
    for name, hints, pattern, *more in (
        ("private key block", "-----BEGIN ",
            SECRETS[0] + r"(?:(?<=END) [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----)?"),
        ("PuTTY key", "PuTTY-User-Key-File", SECRETS[1]),
        ("age key", "AGE-SECRET-KEY", r"\bAGE-SECRET-KEY-1[0-9A-Z]{58}\b"),
        ("AWS key id", "AKIA|ASIA", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b(?<!EXAMPLE)"),
        ("AWS secret", "aws|AWS|Aws",
            r"(?i)aws.{0,20}?(?:secret|key).{0,20}?[=:]\s{0,4}[\"']?([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])(?<!EXAMPLEKEY)"),
        ("GitHub", "ghp_|gho_|ghu_|ghs_|ghr_|github_pat_",
            r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b|\bgithub_pat_[A-Za-z0-9_]{22,255}\b"),
        ("GitLab", "glpat-|gldt-|glrt-|glptt-|glsoat-|glcbt-|glft-|glagent-",
         r"\bgl(?:pat|dt|rt|ptt|soat|cbt|ft|agent)-[A-Za-z0-9_-]{20,}(?:\.[A-Za-z0-9_.-]+)?"),
        ("Slack", "xox|xapp-|hooks.slack.com",
         r"\bxox[abeoprs]-[A-Za-z0-9-]{0,60}\d[A-Za-z0-9-]{9,}|\bxapp-\d-[A-Za-z0-9-]{20,}|hooks\.slack\.com/services/(?=T[A-Z0-9]{6})[A-Za-z0-9_/]{30,}"),
        ("Stripe", "sk_live_|sk_test_|rk_live_|rk_test_|whsec_",
            r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{20,}\b|\bwhsec_[A-Za-z0-9+/]{32,}={0,2}"),
        ("Google", "AIza|GOCSPX-|ya29.",
            r"\bAIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])|\bGOCSPX-[A-Za-z0-9_-]{28}\b|\bya29\.[A-Za-z0-9_-]{30,}"),
        ("Anthropic, OpenAI", "sk-",
            r"\bsk-(?:ant|proj|svcacct|admin|or-v1)-[A-Za-z0-9_-]{32,}|\bsk-[A-Za-z0-9]{32,}\b"),
        ("other AI services", "gsk_|xai-|pplx-|r8_|hf_",
         r"\bgsk_[A-Za-z0-9]{40,}\b|\bxai-[A-Za-z0-9]{60,}\b|\bpplx-[A-Za-z0-9]{40,}\b|\br8_[A-Za-z0-9]{37}\b|\bhf_[A-Za-z0-9]{34}\b"),
        ("npm", "npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
        ("PyPI", "pypi-Ag", r"\bpypi-Ag(?:EIcHlwaS|ENdGVzdC)[A-Za-z0-9_-]{50,}"),
        ("SendGrid", "SG.", r"\bSG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])"),
        ("Twilio", "SK", r"SK[0-9a-f]{32}\b(?<!\w.{34})"),
        ("Azure", "AccountKey=|SharedAccessKey=|?sig=|&sig=|;sig=",
         r"(?:AccountKey|SharedAccessKey)=([A-Za-z0-9+/]{43,86}={1,2})|[?&;]sig=([\w%+/.~-]{30,2000}+)"),
        ("DigitalOcean", "dop_v1_|doo_v1_|dor_v1_", r"\bdo[opr]_v1_[a-f0-9]{64}\b"),
        ("other services", "shpat_|shpss_", r"\bshp(?:at|ss)_[a-fA-F0-9]{32}\b"),
        ("other services", "key-", r"key-[0-9a-f]{32}\b"),
        ("other services", "hvs.", r"\bhvs\.[A-Za-z0-9_-]{24,}"),
        ("other services", "glsa_|dckr_pat_", r"\bglsa_[A-Za-z0-9]{32}_[a-f0-9]{8}\b|\bdckr_pat_[A-Za-z0-9_-]{27}"),
        ("other services", "lin_api_|rubygems_", r"\blin_api_[A-Za-z0-9]{40}\b|\brubygems_[a-f0-9]{48}\b"),
        ("other services", "NRAK-|PMAK-", r"\bNRAK-[A-Z0-9]{27}\b|\bPMAK-[a-f0-9]{24}-[a-f0-9]{34}\b"),
        ("other services", "sbp_|sntrys_|tfp_",
            r"\bsbp_[a-f0-9]{40}\b|\bsntrys_[A-Za-z0-9+/=_]{60,}|\btfp_[A-Za-z0-9_]{40,}"),
        ("other services", "dapi", r"dapi[a-f0-9]{32}\b"),
        ("other services", ":AA", r"(?<=\d{8}):AA[A-Za-z0-9_-]{33}(?![A-Za-z0-9_-])"),
        ("other services", "pul-", r"pul-[a-f0-9]{40}\b"),
        ("JSON Web Token", "eyJ", SECRETS[2]),
        ("other services", ".atlasv1.|ntn_|figd_|dp.pt.|dp.st.",
            r"\b\w{14}\.atlasv1\.[\w-]{60,}|\bntn_[A-Za-z0-9]{40,}|\bfigd_[\w-]{36,}|\bdp\.[ps]t\.(?:[\w-]{1,40}\.)?[A-Za-z0-9]{40,}"),
        ("other services", "/webhooks/", r"discord(?:app)?\.com/api/(?:v\d{1,2}/)?webhooks/\d{15,20}/[\w-]{60,}"),
        ("token in a URL", "://", r"://([\w.~+=-]{20,200}+)(?::[\w-]{0,20})?@[\w.\[-]",
            lambda match: looks_random(match[1])),
        ("password in a URL", "://", r"://[^\s/:@\"'`<>]{0,100}+:(?!\d+/|port/|PORT/)(?=[^\s\"'`<>,|\\@]{0,200}+@)([^\s\"'`<>,|\\]{3,200})@(?!sha\d+:)[\w.\[-]",
            is_no_placeholder),
        ("sent for authorization", "uthorization|UTHORIZATION", r"(?i:uthorization)[\"'`]?\s{0,3}[:=,]\s{0,3}[\"'`]?"
            r"(?i:bearer|basic|token|apikey) {1,4}([A-Za-z0-9+/_.~-]{12,9000}+=*)", is_made_up),
        ("parameter of a program", "--",
            r"(?:token|secret|password|passwd|passphrase|api-?key|access-key)(?:=|\s{1,4})[\"']?(?!-)([^\s\"'`=;|&,:\\]{8,2000}+)",
            lambda match: is_option(match) and is_made_up(match)),
        ("password of a connection", "assword=|wd=|WD=",
            r"[?&;]\s?(?i:password|passwd|pwd)=([^\s&;\"'`<>|\\]{6,200})(?=[&;\"'`\s\\]|$)", is_made_up),
        ("password of a machine", "login ",
            r"\blogin\s{1,4}[^\s]{1,100}\s{1,9}password\s{1,4}([^\s]{6,200})", is_made_up),
        ("assigned to a secret's name", "", r"[:=](?:>?\s{0,4}[\"'`]([A-Za-z0-9+/_=.~%-]{12,200})[\"'`]|"
            rf"(?:(?<={NAME_ENDS}[:=])|(?<={NAME_ENDS}[\"' :][:=])) {{0,4}}"
            r"([A-Za-z0-9+/_.~-]{12,2000}+={0,2})(?=[\"'`\s;&,<\\]|$))", is_assigned_to_a_secret),
    )
)  # fmt: skip


@functools.cache
def secret_hints() -> list[tuple[re.Pattern[str], list[str]]]:
    """All hints, those with one beginning together: a pattern of theirs is found, or not, as fast as a single text."""
    hints = sorted(hint for form in SECRET_FORMS for hint in form.hints)
    groups = [list(group) for _, group in itertools.groupby(hints, key=lambda hint: hint[0])]
    return [(re.compile("|".join(map(re.escape, group))), group) for group in groups]
