"""How well secrets are told from everything else: ``python -m tests.benchmarks.redaction FOLDER_OR_SDIST ...`` prints a
table.

The middle column is measured on tokens made at random in each form, each set into lines of several languages; the last
one counts what is redacted in the given source trees, where almost nothing is a secret. ``--show`` prints those lines,
cut short.
"""

from __future__ import annotations

import argparse
import random
import re
import string
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from cco_sidecar import bundled_folder, import_file, redact

CONTEXT = (bundled_folder() or Path()) / "context"
is_secret = import_file(CONTEXT / "_withheld.py").is_secret
SECRET_FORMS = import_file(CONTEXT / "_redaction.py").SECRET_FORMS

LETTERS, HEX, BASE64 = (
    string.ascii_letters + string.digits,
    "0123456789abcdef",
    string.ascii_letters + string.digits + "+/",
)
FRAMES = (
    'token = "{}"',
    "export TOKEN={}\n",
    '{{"value": "{}"}}',
    "curl -H 'Authorization: Bearer {}' x\n",
    "- name: {}\n",
    "a\n{}\nb\n",
)
ASSIGNMENTS = (
    'client_secret = "{}"',
    "  api_key: '{}'\n",
    '"authToken": "{}",',
    "const PASSWORD = `{}`;",
    'headers["X-Api-Key"] = "{}"',
)


def samples(rng: random.Random) -> dict[str, Callable[[], str]]:
    """For each form a maker of tokens; the prefixes are put together here, so that no scanner takes this file for a
    leak.
    """

    def some(alphabet: str, number: int) -> str:
        return "".join(rng.choices(alphabet, k=number))

    def armoured() -> str:
        kind = rng.choice(["RSA ", "EC ", "OPENSSH ", "", "ENCRYPTED "]) + "PRIVATE "
        lines = "\n".join(some(BASE64, 64) for _ in range(rng.randint(2, 30)))
        return f"-----BEGIN {kind}KEY-----\n{lines}\n-----END {kind}KEY-----"

    def pick(*forms: Callable[[], str]) -> Callable[[], str]:
        return lambda: rng.choice(forms)()

    return {
        "private key block": armoured,
        "PuTTY key": lambda: f"PuTTY-User-Key-File-3: ssh-rsa\nEncryption: none\nPrivate-Lines: 1\n{some(BASE64, 64)}\nPrivate-MAC: {some(HEX, 64)}",
        "age key": lambda: "AGE-SECRET-" + "KEY-1" + some(string.ascii_uppercase + string.digits, 58),
        "AWS key id": lambda: rng.choice(["AKI", "ASI"]) + "A" + some(string.ascii_uppercase + "234567", 16),
        "AWS secret": lambda: f"aws_secret_access_key = {some(BASE64, 40)}",
        "GitHub": pick(lambda: "gh" + rng.choice("pousr") + "_" + some(LETTERS, 36), lambda: "github" + "_pat_" + some(LETTERS, 82)),
        "GitLab": lambda: "glp" + "at-" + some(LETTERS + "-_", 20),
        "Slack": pick(lambda: "xo" + "xb-" + some("0123456789", 12) + "-" + some(LETTERS, 24),
                      lambda: "https://hooks.slack" + ".com/services/T" + some("A1B2C3D4", 9) + "/B" + some("A1B2", 9) + "/" + some(LETTERS, 24)),
        "Stripe": lambda: rng.choice("sr") + "k_" + rng.choice(["live", "test"]) + "_" + some(LETTERS, rng.choice([24, 99])),
        "Google": pick(lambda: "AI" + "za" + some(LETTERS + "-_", 35), lambda: "GOC" + "SPX-" + some(LETTERS, 28)),
        "Anthropic, OpenAI": pick(lambda: "s" + "k-ant-api03-" + some(LETTERS + "-_", 93) + "AA", lambda: "s" + "k-proj-" + some(LETTERS + "-_", 120),
                                  lambda: "s" + "k-" + some(LETTERS, 48)),
        "other AI services": pick(lambda: "gs" + "k_" + some(LETTERS, 52), lambda: "h" + "f_" + some(string.ascii_letters, 34)),
        "npm": lambda: "np" + "m_" + some(LETTERS, 36),
        "PyPI": lambda: "py" + "pi-AgEIcHlwaS5vcmc" + some(LETTERS + "-_", 150),
        "SendGrid": lambda: "S" + "G." + some(LETTERS + "-_", 22) + "." + some(LETTERS + "-_", 43),
        "Twilio": lambda: "S" + "K" + some(HEX, 32),
        "Azure": pick(lambda: f"AccountName=x;Account{'Key'}={some(BASE64, 86)}==;EndpointSuffix=y",
                      lambda: f"https://x.blob.core.windows.net/y?sv=2024&s{'ig'}={some(LETTERS, 43)}%3D"),
        "DigitalOcean": lambda: "do" + "p_v1_" + some(HEX, 64),
        "other services": pick(lambda: "shp" + "at_" + some(HEX, 32), lambda: "hv" + "s." + some(LETTERS, 24),
                               lambda: "dckr" + "_pat_" + some(LETTERS, 27), lambda: some("123456789", 9) + ":A" + "A" + some(LETTERS + "-_", 33)),
        "JSON Web Token": lambda: "ey" + "J" + some(LETTERS, 20) + ".ey" + "J" + some(LETTERS + "-_", 80) + "." + some(LETTERS + "-_", 43),
        "password in a URL": lambda: f"postgres://service:{some(LETTERS + '-_!', 16)}@db.internal:5432/x",
        "token in a URL": lambda: f"https://{some(LETTERS, 37)}Z1q@host.example/x.git",
        "sent for authorization": lambda: f"Authorization: Bearer {some(LETTERS, 37)}Z1q",
        "parameter of a program": lambda: f"login --token={some(LETTERS, 33)}Z1q",
        "password of a connection": lambda: f"Server=db;User Id=sa;Password={some(LETTERS, 21)}Z1q;",
        "password of a machine": lambda: f"machine host.example login me password {some(LETTERS, 21)}Z1q",
        "assigned to a secret's name": lambda: some(BASE64, rng.randint(28, 64)),
    }  # fmt: skip


def found_again(
    name: str,
    make: Callable[[], str],
    rng: random.Random,
    number: int,
    redact: Callable[[str], tuple[str, int]] = redact,
) -> int:
    """Of ``number`` tokens, how many are gone from their line."""
    frames = (
        ASSIGNMENTS
        if name.startswith("assigned")
        else ("{}", "# {}\n", "a\n{}\nb\n")
        if re.search("://| = |--token|Password|password |: Bearer", make())
        else FRAMES
    )
    gone = 0
    for _ in range(number):
        token = make()
        gone += redact(rng.choice(frames).format(token))[1] > 0
    return gone


def sources(place: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of what a context may hold of a folder or an sdist."""
    if place.is_dir():
        files = (
            (str(path), path.read_bytes()) for path in place.rglob("*") if path.is_file() and not path.is_symlink()
        )
    else:
        files = read_tar(place)
    for name, content in files:
        if not is_secret(name) and b"\0" not in content[:8192] and len(content) <= 1_000_000:
            yield name, content.decode("utf-8", "replace")


def read_tar(place: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(place) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file:
                yield member.name, file.read()


def by_form(name: str, content: str, show: bool) -> Counter[str]:
    hits: Counter[str] = Counter()
    for form in SECRET_FORMS:
        after, number = form.redact(content)
        hits[form.name] += number
        if number and show:
            kept = set(after.splitlines())
            for line in [line for line in content.splitlines() if line not in kept][:5]:
                print(f"{form.name}: {name}: {line.strip()[:110]}")
        content = after
    return hits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("places", nargs="*", type=Path)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    rng = random.Random(1)
    makers = samples(rng)
    again = {
        name: found_again(name, makers[name], rng, options.number)
        for name in dict.fromkeys(form.name for form in SECRET_FORMS)
    }
    hits: Counter[str] = Counter()
    size, seconds, files = 0, 0.0, 0
    for place in options.places:
        for name, text in sources(place):
            began = time.perf_counter()
            number = redact(text)[1]
            files, size, seconds = files + 1, size + len(text), seconds + time.perf_counter() - began
            if number:
                hits += by_form(name, text, options.show)
    print(f"| form | found, of {options.number} | redacted in {files:,} files, {size / 1e6:.0f} MB |\n|---|---|---|")
    for name in again:
        print(f"| {name} | {again[name]} | {hits[name]} |")
    print(f"{seconds / max(size, 1) * 1e9:.1f} ms a megabyte")


if __name__ == "__main__":
    main()
