"""Secrets are taken out of what agents read, in every documented form, and what only looks like one stays."""

import random
from pathlib import Path

import pytest

from cco_sidecar import REDACTED, SECRET_FORMS, is_secret, redact
from tests.benchmarks.redaction import by_form, found_again, samples

NAMES = list(dict.fromkeys(form.name for form in SECRET_FORMS))


@pytest.mark.parametrize("name", NAMES)
def test_every_form_is_found_in_every_surrounding(name: str) -> None:
    rng = random.Random(3)
    again = found_again(name, samples(rng)[name], rng, 200)
    assert again >= (198 if name.startswith("assigned") else 200)  # a random text may happen to look less than random


def test_the_forms_of_the_measurement_are_those_of_the_module() -> None:
    assert set(samples(random.Random(1))) == set(NAMES)


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ("postgres://user:Zq9-blue@db/x", f"postgres://user:{REDACTED}@db/x"),
        (
            "redis://:Zq9-blue@cache:6379 and https://a:Zq9-red@b",
            f"redis://:{REDACTED}@cache:6379 and https://a:{REDACTED}@b",
        ),
        ("aws_secret_access_key = " + "aB3/" * 10, f"aws_secret_access_key = {REDACTED}"),
        ("Account" + "Key=" + "aB3/" * 21 + "xy==;End", f"AccountKey={REDACTED};End"),
        ('client_secret = "' + "aB3xY7pQ9rT2vW5z" + '8mN4"', f'client_secret = "{REDACTED}"'),
        ("password: '" + "0123456789abcdef" * 2 + "'", f"password: '{REDACTED}'"),
    ],
)
def test_only_the_secret_is_taken_out_of_its_surroundings(content: str, left: str) -> None:
    assert redact(content) == (left, left.count(REDACTED))


@pytest.mark.parametrize(
    "content",
    [
        "https://user:password@example.org", "postgres://postgres:postgres@localhost/db", "http://user:pass@host", "amqp://guest:guest@localhost",
        "https://{user}:{password}@host", "https://$USER:$PASSWORD@host", "https://<user>:<password>@host", "ftp://a:****@host",
        "http://[::1]:8080/@x", "https://host:8080/path@1", "see https://docs.example/a: b@c", "git@github.com:org/project.git",
        'if "-----BEGIN RSA ' + 'PRIVATE KEY-----" in text:\n    return True\n' + "x = 1\n" * 50,
        "The line -----BEGIN PRIVATE " + "KEY----- begins a key.\n", "AKI" + "AIOSFODNN7EXAMPLE",
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        'token = "the-quick-brown-fox-jumps"',
        'password_field_label = "Please enter your password"', 'secret = os.environ["A_LONG_NAME_OF_A_VARIABLE"]',
        'sha256 = "' + "0123456789abcdef" * 4 + '"', 'checksum: "' + "aB3xY7pQ9rT2vW5z8mN4" + '"',
        'token_type = "urn:ietf:params:oauth:token-type:jwt"',
        "class TASK: SKIP = 1", "sk-toggleable__label-arrow", "task-management-and-more-words-in-a-row-here",
        "key-value-store-with-a-long-name-0123456789",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_secret_stays(content: str) -> None:
    assert redact(content) == (content, 0)


def test_a_key_that_the_files_end_cuts_off_is_redacted_and_nothing_else() -> None:
    key = (
        "-----BEGIN EC "
        + "PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n"
        + ("A1b2" * 16 + "\n") * 5
    )
    lines = "\n" * key.count("\n")  # those that follow keep their numbers
    assert redact("before\n" + key) == ("before\n" + REDACTED + lines, 1)
    assert redact(f'KEY = "{key}-----END EC PRIVATE ' + 'KEY-----"\nafter = 1\n') == (
        f'KEY = "{REDACTED}{lines}"\nafter = 1\n',
        1,
    )


def test_long_texts_without_secrets_take_time_in_proportion_to_their_length() -> None:
    armour = "-----BEGIN PRIVATE " + "KEY-----\n"
    for text in (
        armour + "A" * 300_000 + "!",
        armour * 10_000,
        *(hint * 50_000 for form in SECRET_FORMS for hint in form.hints),
        '= "' * 100_000,
    ):
        redact(text)  # a pattern that backtracks would not come back


def test_this_projects_own_sources_hold_no_secret() -> None:
    root = Path(__file__).parent.parent
    for path in [
        *root.glob("*.py"),
        *root.glob("*.md"),
        *root.glob("plugins/*/*.py"),
        *root.glob("tests/benchmarks/*.py"),
    ]:
        assert not by_form(path.name, path.read_text(), False).total(), path


@pytest.mark.parametrize(
    "path",
    [".envrc", "x/kubeconfig", "client_secret_1.json", "config/master.key", "x.keytab", "home/.my.cnf", "vpn.ovpn"],
)
def test_more_files_that_hold_nothing_but_secrets(path: str) -> None:
    assert is_secret(path)
