"""Answers are gzip where the client takes it and it pays, and say the same as without."""

import asyncio
import gzip
import json
import random
import subprocess
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from conftest import ROOT, Client, Service, make_repository, needed, serving

from cco_sidecar import MB, import_file

compression = import_file(ROOT / "plugins/http/compression.py")
Compression, accepts_gzip = compression.Compression, compression.accepts_gzip

CONTEXT = "/api/context/issue-1/python-specialist"


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("gzip", True), ("GZIP", True), ("gzip, deflate, br", True), ("br;q=1.0, gzip;q=0.8, *;q=0.1", True), ("*", True), ("x-gzip", True),
        ("gzip;q=0.001", True), ("gzip ; q=1", True), ("", False), ("identity", False), ("br", False), ("gzip;q=0", False),
        ("gzip;q=0.000, *", False), ("gzip; Q=0.0", False), ("*;q=0", False), ("gzipped", False), ("deflate", False),
    ],
)  # fmt: skip
def test_which_clients_take_gzip(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


def fetch(client: Client, path: str, coding: str = "gzip", **headers: str) -> tuple[requests.Response, bytes]:
    """The answer, and its body as sent."""
    answer = client.request("GET", path, headers={"Accept-Encoding": coding, **headers}, stream=True)
    return answer, answer.raw.read(decode_content=False)


def settled(content: bytes) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(content)
    return {name: value for name, value in body.items() if name not in ("timestamp", "cache_hit")}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose contexts have about a megabyte, without a watcher that could empty the cache between two
    requests.
    """
    folder = tmp_path_factory.mktemp("large")
    repository, words = make_repository(folder / "repository"), random.Random(7)
    for number in range(20):
        lines = [f"def f_{n}(): return {words.getrandbits(80)}  # and so on, line by line\n" for n in range(700)]
        (repository / f"src/module_{number}.py").write_text("".join(lines))
    with serving(folder, "--no-watch", root=repository) as running:
        yield running


def test_a_context_is_compressed_where_that_is_asked_for(large: Service) -> None:
    client = large.client()
    plain, as_it_is = fetch(client, CONTEXT, "identity")
    assert "Content-Encoding" not in plain.headers and len(as_it_is) > 500_000
    for _ in range(3):  # built, cached, and cached in both forms
        packed, content = fetch(client, CONTEXT)
        assert packed.headers["Content-Encoding"] == "gzip"
        assert int(packed.headers["Content-Length"]) == len(content) < len(as_it_is) / 2
        assert settled(gzip.decompress(content)) == settled(as_it_is)
        assert packed.headers["ETag"] == plain.headers["ETag"]
    assert "Accept-Encoding" in plain.headers["Vary"] and "Accept-Encoding" in packed.headers["Vary"]


def test_time_stamps_stay_true_in_compressed_answers(large: Service) -> None:
    first = json.loads(gzip.decompress(fetch(large.client(), "/api/context/issue-2/test-engineer")[1]))
    again = json.loads(gzip.decompress(fetch(large.client(), "/api/context/issue-2/test-engineer")[1]))
    assert (first["cache_hit"], again["cache_hit"]) == (False, True)
    assert first["timestamp"] <= again["timestamp"]


def test_an_etag_of_either_form_saves_both(large: Service) -> None:
    client = large.client()
    etag = fetch(client, CONTEXT)[0].headers["ETag"]
    assert etag.startswith('W/"')
    for coding in ("gzip", "identity"):
        for known in (etag, etag.removeprefix("W/"), f'"other", {etag}', "*"):
            answer, content = fetch(client, CONTEXT, coding, **{"If-None-Match": known})
            assert (answer.status_code, content, answer.headers["ETag"]) == (304, b"", etag)
            assert "Accept-Encoding" in answer.headers["Vary"] and "Content-Encoding" not in answer.headers
        assert fetch(client, CONTEXT, coding, **{"If-None-Match": '"other"'})[0].status_code == 200


def test_head_has_the_headers_of_the_compressed_answer(large: Service) -> None:
    got = large.client().request("GET", "/openapi.json", headers={"Accept-Encoding": "gzip"})
    head = large.client().request("HEAD", "/openapi.json", headers={"Accept-Encoding": "gzip"})
    assert head.headers["Content-Encoding"] == got.headers["Content-Encoding"] == "gzip"
    assert head.headers["Content-Length"] == got.headers["Content-Length"] and head.content == b""


def test_short_answers_stay_as_they_are(large: Service) -> None:
    for path in ("/health", "/api/nothing", "/api/agents"):
        answer, content = fetch(large.client(), path)
        assert "Content-Encoding" not in answer.headers and json.loads(content)


def test_answers_that_hold_tokens_are_never_compressed(make_service: Callable[..., Service]) -> None:
    service = make_service("--agent-command", "true")
    client = service.client(sub="x" * 1500, issue_id="issue-1")  # a long name makes a long token
    spawn = {
        "agent_type": "python-specialist",
        "issue_id": "issue-1",
        "environment": {f"PYTHON_{n}" * 20: "1" for n in range(40)},
    }
    for path, body in (
        ("/api/auth/refresh", None),
        ("/api/agents/spawn", spawn | {"environment": {"LD_" + "X" * 1500: "1"}}),
    ):
        answer = client.post(path, body, headers={"Accept-Encoding": "gzip"})
        assert answer.ok and len(answer.content) > 1024, answer.text
        assert "Content-Encoding" not in answer.headers


@pytest.mark.parametrize("protocol", ["--http1.1", "--http2-prior-knowledge"])
def test_curl_reads_compressed_answers_over_both_protocols(large: Service, protocol: str) -> None:
    for _ in range(2):
        token = ["-H", f"Authorization: Bearer {large.token()}"]
        command = [needed("curl"), "-sS", "--compressed", protocol, "-D", "-", *token, large.url + CONTEXT]
        head, _, content = subprocess.run(command, check=True, capture_output=True, timeout=30).stdout.partition(
            b"\r\n\r\n"
        )
        assert b"content-encoding: gzip" in head.lower()
        assert settled(content)["issue_id"] == "issue-1"


# -- the parts


def answer(marks: str, text: str = "x" * 200_000) -> bytes:
    return f'{{"context":"{text}","timestamp":"{marks}"}}'.encode()


def test_a_context_is_compressed_once_for_all_who_wait_for_it() -> None:
    compression = Compression()

    async def run() -> None:
        content = answer("0")
        packed = await asyncio.gather(*(compression.gzip(content, 'W/"one"') for _ in range(5)))
        packed.append(await compression.gzip(content, 'W/"one"'))
        assert all(one is packed[0] for one in packed) and (hits := compression.hits) >= 1
        reader = zlib.decompressobj(wbits=31)
        assert reader.decompress(packed[0]) == content and reader.eof and not reader.unused_data, (
            "one member: curl reads no second one"
        )
        other = answer("5", "y" * 200_000)  # an ETag that tells too little must not mix two contents
        assert gzip.decompress(await compression.gzip(other, 'W/"one"')) == other
        assert compression.hits == hits

    asyncio.run(run())


@pytest.mark.parametrize("length", [2_000, 30_000, 200_000])
def test_what_was_compressed_before_is_given_at_once(length: int) -> None:
    """Without a thread, for which a small answer would wait as long as for all else of it."""
    compression, content = Compression(), answer("0", "x" * length)
    first = asyncio.run(compression.gzip(content, 'W/"one"'))
    with pytest.raises(StopIteration) as given:
        compression.gzip(content, 'W/"one"').send(None)
    assert given.value.value is first and compression.hits == 1


@pytest.mark.parametrize(
    "content", [b"", b"short", b'{"timestamp":1}', b"\0" * 5_000_000, random.Random(1).randbytes(1_000_000)], ids=len
)
@pytest.mark.parametrize("etag", [None, 'W/"x"'])
def test_any_content_comes_back(content: bytes, etag: str | None) -> None:
    assert gzip.decompress(asyncio.run(Compression().gzip(content, etag))) == content


def test_the_compressed_forms_that_are_kept_are_bounded() -> None:
    compression, noise = Compression(), random.Random(2)

    async def run() -> None:
        for number in range(30):
            content = answer("now", noise.randbytes(500_000).hex())
            assert gzip.decompress(await compression.gzip(content, f'W/"{number}"')) == content
            assert compression._bytes == sum(map(len, compression._cache.values())) <= 16 * MB
        assert 20 < len(compression._cache) <= 30

    asyncio.run(run())
