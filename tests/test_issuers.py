"""Tokens that an identity provider signs: the configured key's own algorithm and no other, beside our own tokens."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from conftest import Client, Service, good_claims, plugin, serving
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

import cco_sidecar
from cco_sidecar import StartError

read_public_key = plugin("issuers").read_public_key
EVENT = {"publisher": "tester", "topic": "test", "data": {}}
KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def public(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def private(key: Any, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))


@pytest.fixture(scope="module", params=KEYS)
def issuer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, str]]:
    """A service that takes the tokens of an issuer, and the issuer's algorithm."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "public.pem").write_bytes(public(KEYS[request.param]))
    with serving(folder, "--jwt-public-key", str(folder / "public.pem")) as running:
        yield running, request.param


def ask(service: Service, token: str, path: str = "/status") -> tuple[int, str | None]:
    answer = Client(service.url, token).get(path)
    return answer.status_code, answer.json().get("code")


def test_tokens_of_the_issuer_and_our_own_are_good(issuer: tuple[Service, str]) -> None:
    service, algorithm = issuer
    assert ask(service, jwt.encode(good_claims(), KEYS[algorithm], algorithm=algorithm)) == (200, None)
    assert ask(
        service, jwt.encode(good_claims(), KEYS[algorithm], algorithm=algorithm, headers={"kid": "2026-01"})
    ) == (
        200,
        None,
    )
    assert ask(service, service.token()) == (200, None)


def by_hand(header: dict[str, Any], secret: bytes) -> str:
    """A token that is HS256 in truth, whatever its header says: PyJWT itself would not make it."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, good_claims())]
    signature = hmac.new(secret, b".".join(parts), hashlib.sha256).digest()
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


ATTACKS: dict[str, Callable[[str, Any], str]] = {
    "signed with the public key as a secret": lambda algorithm, key: by_hand(
        {"alg": "HS256", "typ": "JWT"}, public(key)
    ),
    "the same without its last line end": lambda algorithm, key: by_hand(
        {"alg": "HS256", "typ": "JWT"}, public(key).rstrip()
    ),
    "signed with the public key, named as ours": lambda algorithm, key: by_hand(
        {"alg": algorithm, "typ": "JWT"}, public(key)
    ),
    "no algorithm": lambda algorithm, key: jwt.encode(good_claims(), None, algorithm="none"),
    "no signature": lambda algorithm, key: jwt.encode(good_claims(), key, algorithm=algorithm).rpartition(".")[0] + ".",
    "edited": lambda algorithm, key: edited(
        jwt.encode(good_claims(agent_type="documentation-expert"), key, algorithm=algorithm)
    ),
    "its key in the header": lambda algorithm, key: jwt.encode(
        good_claims(),
        KEYS2[algorithm],
        algorithm=algorithm,
        headers={"jwk": {"kty": "RSA"}, "x5c": ["MII"], "jku": "http://localhost/keys"},
    ),
    "another key": lambda algorithm, key: jwt.encode(good_claims(), KEYS2[algorithm], algorithm=algorithm),
    "a critical header": lambda algorithm, key: jwt.encode(
        good_claims(), key, algorithm=algorithm, headers={"crit": ["x"], "x": 1}
    ),
}
KEYS2: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
for other, made in {"RS256": ("RS384", "RS512", "PS256"), "ES256": ()}.items():
    for name in made:
        ATTACKS[f"{name} with the right key"] = lambda algorithm, key, name=name, other=other: (
            jwt.encode(good_claims(), key, algorithm=name) if algorithm == other else by_hand({"alg": name}, b"x")
        )
for name in ("sub", "agent_type", "project_id", "permissions", "exp", "iat"):
    ATTACKS[f"{name} missing"] = lambda algorithm, key, name=name: jwt.encode(
        good_claims(**{name: None}), key, algorithm=algorithm
    )
for name in KEYS:
    ATTACKS[f"{name} of a key that is not configured"] = lambda algorithm, key, name=name: jwt.encode(
        good_claims(), KEYS2[name], algorithm=name
    )


def edited(token: str) -> str:
    header, _, signature = token.split(".")
    return f"{header}.{base64.urlsafe_b64encode(json.dumps(good_claims()).encode()).rstrip(b'=').decode()}.{signature}"


@pytest.mark.parametrize("attack", ATTACKS)
def test_forged_tokens_are_refused(issuer: tuple[Service, str], attack: str) -> None:
    service, algorithm = issuer
    assert ask(service, ATTACKS[attack](algorithm, KEYS[algorithm])) == (401, "AUTH_001")


def test_the_same_rules_hold_for_them(issuer: tuple[Service, str]) -> None:
    service, algorithm = issuer

    def token(**change: Any) -> str:
        return jwt.encode(good_claims(**change), KEYS[algorithm], algorithm=algorithm)

    assert ask(service, token(exp=1)) == (401, "AUTH_002")
    assert ask(service, token(project_id="another")) == (403, "AUTH_003")
    assert ask(service, token(issue_id="issue-1"), "/api/context/issue-2/python-specialist") == (403, "AUTH_003")
    reader = Client(service.url, token(agent_type="documentation-expert"))
    assert reader.post("/api/events/ping", EVENT).status_code == 403, "never more than its type's category"
    bound = Client(service.url, token(sub="agent-1", bound=True))
    assert bound.post("/api/events/ping", EVENT).status_code == 403


def test_only_their_issuer_refreshes_them(issuer: tuple[Service, str]) -> None:
    service, algorithm = issuer
    for said in (None, False):  # whatever the token itself claims
        token = jwt.encode(
            good_claims(exp=int(time.time()) + 100, issued_elsewhere=said), KEYS[algorithm], algorithm=algorithm
        )
        client = Client(service.url, token)
        assert "X-Refreshed-Token" not in client.get("/status").headers
        answer = client.post("/api/auth/refresh")
        assert (answer.status_code, answer.json()["code"]) == (403, "AUTH_003")


def test_without_a_configured_key_no_foreign_token_is_good(service: Service) -> None:
    for algorithm, key in KEYS.items():
        assert ask(service, jwt.encode(good_claims(), key, algorithm=algorithm)) == (401, "AUTH_001")


# -- the key's file


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_keys_type_fixes_the_algorithm(tmp_path: Path, algorithm: str) -> None:
    (tmp_path / "key.pem").write_bytes(b"# the team's key\n" + public(KEYS[algorithm]))
    assert read_public_key(tmp_path / "key.pem")[1] == algorithm


BAD_KEYS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "cannot be read"),
    "empty": (b"", "not a public key"),
    "a shared secret": (b"a secret that is long enough to sign with", "not a public key"),
    "private RSA": (private(KEYS["RS256"]), "private key"),
    "private RSA, old form": (private(KEYS["RS256"], PrivateFormat.TraditionalOpenSSL), "private key"),
    "private EC": (private(KEYS["ES256"], PrivateFormat.TraditionalOpenSSL), "private key"),
    "private Ed25519": (private(KEYS["EdDSA"]), "private key"),
    "OpenSSH private": (private(KEYS["EdDSA"], PrivateFormat.OpenSSH), "private key"),
    "OpenSSH public": (
        KEYS["EdDSA"].public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        "not a public key",
    ),
    "broken": (public(KEYS["RS256"])[:200], "not a public key"),
    "short RSA": (public(rsa.generate_private_key(65537, 1024)), "2048 bits"),
    "another curve": (public(ec.generate_private_key(ec.SECP384R1())), "P-256"),
    "Ed448": (public(ed448.Ed448PrivateKey.generate()), "Ed25519"),
    "DSA": (public(dsa.generate_private_key(2048)), "must be RSA"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_key_that_does_not_do_is_one_line_and_exit_code_2(tmp_path: Path, name: str) -> None:
    content, reason = BAD_KEYS[name]
    if content is not None:
        (tmp_path / "key.pem").write_bytes(content)
    with pytest.raises(StartError, match=reason) as refusal:
        read_public_key(tmp_path / "key.pem")
    assert refusal.value.exit_code == 2 and "\n" not in str(refusal.value)
    if content and b"PRIVATE" in content:
        assert content.splitlines()[1].decode() not in str(refusal.value)


def test_the_service_does_not_start_with_such_a_key(
    tmp_path: Path, repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key.pem").write_bytes(private(KEYS["RS256"]))
    command = ["serve", "--root", str(repository), "--storage", str(tmp_path / "storage"), "--port", "0"]
    assert cco_sidecar.main([*command, "--jwt-public-key", str(tmp_path / "key.pem")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("cco: --jwt-public-key: ") and error.count("\n") == 1


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(StartError, match="extra `crypto`"):
        read_public_key(tmp_path / "key.pem")


def test_without_the_plugin_a_configured_key_stops_the_start(
    tmp_path: Path, repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key.pem").write_bytes(public(KEYS["EdDSA"]))
    command = ["serve", f"--root={repository}", f"--storage={tmp_path / 'storage'}", "--port=0", "--no-plugins"]
    assert cco_sidecar.main([*command, "--jwt-public-key", str(tmp_path / "key.pem")]) == 2
    assert (
        capfd.readouterr().err
        == "cco: --jwt-public-key: the plugin issuers, which reads it, is not loaded: plugins are turned off by --no-plugins\n"
    )
