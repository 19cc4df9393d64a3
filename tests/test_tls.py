"""HTTPS: which versions, what happens when certificates are renewed (plugin tls), and that the rules of HTTP
hold.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from conftest import MODULE, Service, clean_environment, plugin, until
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from cco_sidecar import Server


def make_pair(folder: Path, name: str, key: Any = None, password: bytes | None = None, authority: Any = None) -> str:
    """Writes cert.pem and key.pem for localhost; the certificate's common name is ``name``, which is returned. It is
    signed by its own key, or by that of an ``authority`` that no file has.
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), datetime.datetime.now(datetime.UTC)
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")]) if authority else subject
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=10)).add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority or key, hashes.SHA256())
    )  # fmt: skip
    form = BestAvailableEncryption(password) if password else NoEncryption()
    write(folder / "cert.pem", certificate.public_bytes(Encoding.PEM))
    write(folder / "key.pem", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, form))
    return name


def write(path: Path, content: bytes) -> None:
    """As renewal tools do: in one step."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


@pytest.fixture
def secure(make_service: Callable[..., Service], tmp_path: Path) -> Callable[..., Service]:
    def start(*more: str) -> Service:
        return make_service("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"), *more)

    return start


def connect(service: Service, alpn: str | None = None, **versions: ssl.TLSVersion) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for name, version in versions.items():
        setattr(context, name, version)
    if alpn:
        context.set_alpn_protocols([alpn])
    return context.wrap_socket(socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=10))


def served_name(service: Service, alpn: str | None = None) -> str:
    with connect(service, alpn) as line:
        assert line.selected_alpn_protocol() == alpn
        certificate = x509.load_der_x509_certificate(line.getpeercert(binary_form=True) or b"")
        return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def test_https_is_1_2_or_newer_and_stays(secure: Callable[..., Service], tmp_path: Path) -> None:
    make_pair(tmp_path, "one")
    service = secure()
    assert service.url.startswith("https://")
    answer = requests.get(f"{service.url}/health", verify=str(tmp_path / "cert.pem"), timeout=10)
    assert answer.status_code == 200
    assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        with connect(service, minimum_version=version, maximum_version=version) as line:
            assert line.version() == {ssl.TLSVersion.TLSv1_2: "TLSv1.2", ssl.TLSVersion.TLSv1_3: "TLSv1.3"}[version]
    context = plugin("tls").tls_context((tmp_path / "cert.pem", tmp_path / "key.pem"))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_older_versions_are_refused(secure: Callable[..., Service], tmp_path: Path) -> None:
    make_pair(tmp_path, "one")
    service = secure()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=10) as line,
        pytest.raises(ssl.SSLError, match=r"(?i)protocol.version|unsupported|no protocols"),
    ):
        context.wrap_socket(line)


def test_a_renewed_certificate_is_served_without_a_restart(secure: Callable[..., Service], tmp_path: Path) -> None:
    make_pair(tmp_path, "one")
    service = secure()
    assert served_name(service) == "one"
    with connect(service) as old:
        make_pair(tmp_path, "two", rsa.generate_private_key(65537, 2048))  # another kind of key
        until(lambda: served_name(service) == "two")
        old.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert old.recv(100).startswith(b"HTTP/1.1 200 "), "lines that are open go on"
    assert served_name(service, "h2") == "two"
    make_pair(tmp_path, "three")
    until(lambda: served_name(service) == "three")
    assert service.log.count("renewed certificate") == 2


def test_broken_certificates_are_logged_and_the_old_one_goes_on(secure: Callable[..., Service], tmp_path: Path) -> None:
    make_pair(tmp_path, "one")
    service = secure()
    good_key = (tmp_path / "key.pem").read_bytes()
    (tmp_path / "locked").mkdir()
    make_pair(tmp_path / "locked", "locked", password=b"a password that nobody types")

    def lock() -> None:
        """The key first: a look in between has nothing new to say, and what was said is not repeated for a minute."""
        for name in ("key.pem", "cert.pem"):
            write(tmp_path / name, (tmp_path / "locked" / name).read_bytes())

    for number, spoil in enumerate([
        lambda: write(tmp_path / "cert.pem", b"not a certificate"),
        lock,
        lambda: write(tmp_path / "key.pem", good_key),  # of another certificate
        lambda: (tmp_path / "key.pem").unlink(),
    ], 1):  # fmt: skip
        spoil()
        until(lambda number=number: service.log.count("cannot be loaded, the old certificate goes on") >= number)
        assert served_name(service) == "one"
    lines = [line for line in service.log.splitlines() if "the old certificate goes on" in line]
    assert not [line for line in lines if str(tmp_path) in line or "PRIVATE" in line]
    make_pair(tmp_path, "two")
    until(lambda: served_name(service) == "two")


def test_a_link_that_is_turned_elsewhere_is_a_renewal(secure: Callable[..., Service], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_pair(tmp_path / name, name)
    for file in ("cert.pem", "key.pem"):
        os.symlink(f"one/{file}", tmp_path / file)
    service = secure()
    for file in ("cert.pem", "key.pem"):
        os.symlink(f"two/{file}", tmp_path / "new")
        (tmp_path / "new").replace(tmp_path / file)
    until(lambda: served_name(service) == "two")


def test_a_bad_pair_at_the_start_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    make_pair(tmp_path, "one", password=b"secret")
    (tmp_path / "open").mkdir()
    make_pair(tmp_path / "open", "two")
    for kind in ("X509", "TRUSTED"):  # OpenSSL reads both, Node and Go neither
        text = (tmp_path / "open/cert.pem").read_text().replace("CERTIFICATE", f"{kind} CERTIFICATE")
        (tmp_path / f"open/{kind}.pem").write_text(text)
    for certificate in ("cert.pem", "nothing.pem", "open/X509.pem", "open/TRUSTED.pem"):
        key = (tmp_path / certificate).parent / "key.pem"
        pair = ["--tls-cert", str(tmp_path / certificate), "--tls-key", str(key)]
        where = [f"--root={tmp_path}", f"--storage={tmp_path.parent / 'refused'}", "--port=0"]
        command = [sys.executable, str(MODULE), *where, *pair]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, env=clean_environment())
        assert ended.returncode == 2 and ended.stdout == ""
        assert re.fullmatch(r"cco: .*cannot be loaded.*\n", ended.stderr), ended.stderr
        assert ("BEGIN CERTIFICATE" in ended.stderr) == certificate.startswith("open/")


def test_refusals_before_the_request_are_the_same_behind_tls(secure: Callable[..., Service], tmp_path: Path) -> None:
    make_pair(tmp_path, "one")
    service = secure("--request-timeout", "1")
    long_line, long_head = b"GET /" + b"x" * 20_000, b"GET / HTTP/1.1\r\nX: " + b"x" * 90_000
    for sent, status in [(b"GARBAGE\r\n\r\n", 400), (long_line, 414), (long_head, 431), (b"GET /", 408)]:
        with connect(service) as line:
            line.sendall(sent)
            answer = b""
            with contextlib.suppress(ssl.SSLEOFError, ConnectionResetError):
                while chunk := line.recv(65_536):
                    answer += chunk
        head, _, content = answer.partition(b"\r\n\r\n")
        assert re.match(rb"HTTP/1\.1 %d " % status, head), answer
        assert json.loads(content)["request_id"].startswith("req-")


def test_plain_http_on_the_tls_port_gets_nothing_out_of_it(secure: Callable[..., Service], tmp_path: Path) -> None:
    make_pair(tmp_path, "one")
    service = secure()
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=10) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := line.recv(65_536):
                answer += chunk
    assert b"HTTP/1.1 200" not in answer
    assert served_name(service) == "one"
    assert "Traceback" not in service.log


def test_a_command_that_speaks_plain_http_to_the_tls_port_is_told_so(
    secure: Callable[..., Service], tmp_path: Path
) -> None:
    make_pair(tmp_path, "localhost")
    service = secure()
    for words in (["health"], ["events", "list"], ["events", "publish", "ping"]):
        token = {"JWT_TOKEN": service.token()}
        ended = ended_run(service, *words, "--url", service.url.replace("https", "http"), env=token)
        said = f"if it serves HTTPS give --url {service.url}, else start the service with"
        assert ended.returncode == 3 and said in ended.stderr, ended.stderr


AGENT = """#!/bin/sh
curl -sS -f "$SIDECAR_URL/results" -H @"$CCO_HEADER_FILE" -H "Content-Type: application/json" -d "{
  \\"agent_id\\": \\"$AGENT_ID\\", \\"agent_type\\": \\"$AGENT_TYPE\\", \\"issue_id\\": \\"$ISSUE_ID\\",
  \\"project_id\\": \\"$PROJECT_ID\\", \\"result\\": {\\"status\\": \\"success\\"}}"
"""
UNSET = dict.fromkeys(
    ("SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"), ""
)


def ended_run(service: Service, *words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MODULE), *words, "--storage", str(service.storage)]
    return subprocess.run(
        command, cwd=service.root, env=clean_environment(**env), capture_output=True, text=True, timeout=60
    )


def run(service: Service, *words: str, env: dict[str, str]) -> str:
    ended = ended_run(service, *words, env=env)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture
def agent(tmp_path: Path) -> str:
    (tmp_path / "agent.sh").write_text(AGENT)
    (tmp_path / "agent.sh").chmod(0o700)
    return str(tmp_path / "agent.sh")


@pytest.mark.parametrize("named", ["", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_agents_and_commands_trust_the_services_own_certificate(
    make_service: Callable[..., Service], tmp_path: Path, agent: str, named: str
) -> None:
    for folder, name in (("other", "another authority"), ("", "localhost")):
        (tmp_path / folder).mkdir(exist_ok=True)
        make_pair(tmp_path / folder, name)
    other = tmp_path / "other" / ("" if named == "SSL_CERT_DIR" else "cert.pem")
    env = UNSET | ({named: str(other)} if named else {})
    pair = ("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    service = make_service(*pair, "--agent-command", agent, env=env)
    spawn = ("agent", "spawn", "--type", "test-engineer", "--issue", "issue-1", "--wait")
    assert "success" in run(service, *spawn, env=UNSET), service.log
    assert "healthy" in run(service, "health", env=UNSET)
    trusted = service.storage / "tls" / "trusted.pem"
    ssl.create_default_context(cafile=str(trusted))  # every line of it can be read
    assert certificates(tmp_path / "cert.pem") <= certificates(trusted)
    assert (certificates(tmp_path / "other" / "cert.pem") <= certificates(trusted)) == bool(named)
    usual = Path(ssl.get_default_verify_paths().openssl_cafile)
    assert not usual.is_file() or certificates(usual) < certificates(trusted)


def certificates(file: Path) -> set[str]:
    return set(re.findall(r"-----BEGIN CERTIFICATE-----\s([^-]+)", file.read_text()))


def test_a_renewed_certificate_is_trusted_too(secure: Callable[..., Service], tmp_path: Path, agent: str) -> None:
    make_pair(tmp_path, "one")
    service = secure("--agent-command", agent)
    make_pair(tmp_path, "two")
    until(lambda: served_name(service) == "two")
    until(lambda: (tmp_path / "cert.pem").read_text() in (service.storage / "tls" / "added.pem").read_text())
    spawn = ("agent", "spawn", "--type", "test-engineer", "--issue", "issue-1", "--wait")
    assert "success" in run(service, *spawn, env=UNSET), service.log


def test_a_renewed_certificate_of_which_agents_cannot_be_told_at_once_is_told_later(
    secure: Callable[..., Service], tmp_path: Path
) -> None:
    make_pair(tmp_path, "one")
    service = secure()
    folder = service.storage / "tls"
    folder.rename(tmp_path / "away")
    folder.touch()
    make_pair(tmp_path, "two")
    until(lambda: "agents and commands do not trust the renewed certificate yet" in service.log)
    assert served_name(service) == "two" and "cannot be loaded" not in service.log
    folder.unlink()
    until(lambda: (folder / "added.pem").exists())
    until(lambda: (tmp_path / "cert.pem").read_text() in (folder / "added.pem").read_text())


def test_agents_trust_all_that_they_would_have_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust = plugin("_trust")
    for name in ("python", "system", "folder", "company", "own"):
        (tmp_path / name).mkdir()
        make_pair(tmp_path / name, name)
    at = {folder.name: str(folder / "cert.pem") for folder in tmp_path.iterdir()}
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: SimpleNamespace(openssl_cafile=at["python"]))
    monkeypatch.setattr(trust, "AUTHORITIES", ("/nowhere", at["system"]))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "folder"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "company"))
    trust.write_trust(tmp_path, Path(at["own"]))
    assert len(trust.certificates_in([*at.values(), *at.values()])) == len(at)
    known = certificates(tmp_path / "tls" / "trusted.pem")
    assert known == set().union(*(certificates(Path(file)) for file in at.values()))
    assert trust.trusting(tmp_path).keys() == {*trust.CHOOSING, trust.ADDING}
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: SimpleNamespace(openssl_cafile=None))
    monkeypatch.setattr(trust, "AUTHORITIES", ())
    trust.write_trust(tmp_path, Path(at["own"]))  # programs go on with what they bring along
    assert trust.trusting(tmp_path).keys() == {trust.ADDING}


@pytest.mark.parametrize("name", ["SSL_CERT_DIR", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"])
def test_a_broken_certificate_among_others_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trust = plugin("_trust")
    for folder in ("company", "own"):
        (tmp_path / folder).mkdir()
        make_pair(tmp_path / folder, folder)
    theirs = tmp_path / "company/cert.pem"
    good = theirs.read_text()
    theirs.write_text(
        good.replace("MI", "MIM", 1) + good + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    )
    for variable in UNSET:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, str(theirs.parent if name == "SSL_CERT_DIR" else theirs))
    trust.write_trust(tmp_path, tmp_path / "own/cert.pem")
    file = tmp_path / "tls" / ("added.pem" if name == "NODE_EXTRA_CA_CERTS" else "trusted.pem")
    assert set(re.findall(r"-----BEGIN CERTIFICATE-----\s([^-]+)", good)) <= certificates(file)
    for each in re.findall(r"-----BEGIN[^-]+-----[^-]+-----END[^-]+-----", file.read_text()):
        ssl.create_default_context(cadata=each)


def test_a_certificate_that_an_authority_signed_is_trusted_by_itself(
    secure: Callable[..., Service], tmp_path: Path
) -> None:
    make_pair(tmp_path, "localhost", authority=ec.generate_private_key(ec.SECP256R1()))
    service = secure()
    assert "healthy" in run(service, "health", env=UNSET)
    named = UNSET | {"SSL_CERT_FILE": str(tmp_path / "cert.pem")}
    assert "healthy" in run(service, "health", "--url", service.url, env=named)
    agent = UNSET | {"SSL_CERT_FILE": str(service.storage / "tls/trusted.pem"), "SIDECAR_URL": f"{service.url}/api"}
    assert "healthy" in run(service, "health", env=agent)


def test_a_key_beside_the_certificate_is_not_given_to_agents(
    tmp_path: Path, make_service: Callable[..., Service]
) -> None:
    make_pair(tmp_path, "one")
    both = tmp_path / "both.pem"
    both.write_bytes((tmp_path / "key.pem").read_bytes() + (tmp_path / "cert.pem").read_bytes())
    service = make_service("--tls-cert", str(both), "--tls-key", str(both))
    for file in (service.storage / "tls").iterdir():
        assert "CERTIFICATE" in file.read_text() and "PRIVATE" not in file.read_text()


def test_a_pipeline_trusts_the_certificate_of_its_own_service(repository: Path, tmp_path: Path, agent: str) -> None:
    make_pair(tmp_path, "localhost")
    words = ["run", "--issue", "issue-1", "--task", "Greet", "--until", "architect", "--agent-command", agent]
    words += ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
    command = [sys.executable, str(MODULE), *words, "--storage", str(tmp_path / "storage")]
    ended = subprocess.run(
        command, cwd=repository, env=clean_environment(**UNSET), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0 and "reached: architect has succeeded" in ended.stdout, ended.stdout + ended.stderr


def test_a_run_of_the_service_trusts_its_certificate(
    secure: Callable[..., Service], tmp_path: Path, agent: str
) -> None:
    make_pair(tmp_path, "localhost")
    service = secure("--agent-command", agent)
    ask = {"issue_id": "issue-1", "task": "Greet", "until": "architect"}
    headers = {"Authorization": f"Bearer {service.token()}"}
    with requests.Session() as session:
        session.verify = str(tmp_path / "cert.pem")
        session.trust_env = False
        answer = session.post(f"{service.url}/api/runs", json=ask, headers=headers, timeout=20)
        assert answer.status_code < 300, answer.text
        path = f"{service.url}/api/runs/{answer.json()['run_id']}"
        until(lambda: session.get(path, headers=headers, timeout=20).json()["state"] != "running", 60)
        assert session.get(path, headers=headers, timeout=20).json()["state"] == "completed"


# -- without


@pytest.mark.parametrize(("address", "told"), [
    ("127.0.0.1", ""), ("127.8.8.8", ""), ("::1", ""), ("0.0.0.0", "http://0.0.0.0:80 is open"),
    ("192.0.2.7", "http://192.0.2.7:80 is open"), ("::", "http://[::]:80 is open"), ("fe80::1%eth0", "[fe80::1%eth0]:80"),
])  # fmt: skip
def test_only_addresses_that_other_machines_reach_are_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str, told: str
) -> None:
    monkeypatch.setattr(Server, "add_sockets", lambda server, sockets: None)
    listening = SimpleNamespace(getsockname=lambda: (address, 80, 0, 0)[: 4 if ":" in address else 2])
    server = plugin("tls").PlainServer
    server(lambda request: None).add_sockets(iter([listening]))
    assert (told in caplog.text) if told else not caplog.text


def test_a_start_that_sends_tokens_in_plain_text_says_so(
    make_service: Callable[..., Service], secure: Callable[..., Service], tmp_path: Path
) -> None:
    make_pair(tmp_path, "one")
    warning = (
        "is open to other machines without TLS: tokens go over the network in plain text; --tls-cert and --tls-key"
    )
    service = make_service("--host", "0.0.0.0")
    told = f"WARNING http://0.0.0.0:{service.url.rpartition(':')[2]} {warning}"
    until(lambda: told in service.log)
    for other in (lambda: secure("--host", "0.0.0.0"), lambda: make_service("--host", "localhost")):
        service.stop()
        service.log_path.unlink()
        service = other()
        service.stop()  # so that all is written
        assert warning not in service.log and "stopping" in service.log, service.log
