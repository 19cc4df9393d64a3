"""The rules of HTTP/1.1's framing, without any I/O: which heads are well-formed and how long they may be, the chunks of
a body, and the whole answer to what never became a request.
"""

from __future__ import annotations

import functools
import http.client
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
from tornado.httputil import HTTPHeaders, RequestStartLine

from cco_sidecar import MAX_FIELDS, MAX_LINE, ApiError, GetContext

BARE_END = re.compile(rb"\n\r?\n")
MAX_NUMBER = 1_000  # fields of a head
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~\x80-\xff]+) (HTTP/1\.[01])\r\n")
OF_CONTEXT = re.compile(rb"(?:\r\n)?(?:GET|HEAD) (?:https?://[^/?#@ ]+)?/api/context/", re.IGNORECASE)
FIELDS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*\r\n")
FRAMING = re.compile(
    r"^(host|content-length|transfer-encoding):[\t ]*([^\r]*?)[\t ]*\r\n", re.IGNORECASE | re.MULTILINE
)
ABSOLUTE = re.compile(r"https?://([^/?#@]+)(.*)", re.IGNORECASE)
TOO_LONG_LINE = "The request line is too long"
TOO_LONG_FIELDS = f"The headers may have {MAX_FIELDS} bytes at most"
MALFORMED = "This is not a well-formed HTTP/1.1 request"


class Fields(HTTPHeaders):
    """The fields of a request or an answer, as Tornado's but cheap to look for and to copy: a copy shares the lists of
    values, which nobody changes.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[str]] = {}

    def get(self, name: str, default: Any = None) -> Any:
        values = self._values.get(usual(name))
        return ",".join(values) if values else default

    def get_list(self, name: str) -> list[str]:
        return self._values.get(usual(name), [])

    def get_all(self) -> Iterator[tuple[str, str]]:
        return ((name, value) for name, values in self._values.items() for value in values)

    def add(self, name: str, value: str, **options: Any) -> None:
        HTTPHeaders().add(name, value, **options)  # which checks both
        self._values[usual(name)] = [*self.get_list(name), value]

    def __getitem__(self, name: str) -> str:
        return ",".join(self._values[usual(name)])

    def __setitem__(self, name: str, value: str) -> None:
        self._values[usual(name)] = [value]

    def __delitem__(self, name: str) -> None:
        del self._values[usual(name)]

    def __contains__(self, name: Any) -> bool:
        return usual(name) in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __eq__(self, other: object) -> bool:
        return self._values == other._values if isinstance(other, Fields) else super().__eq__(other)

    def copy(self) -> Fields:
        other = Fields()
        other._values = self._values.copy()
        return other

    __copy__ = copy


class UsualNames(dict[str, str]):
    """Names of fields in the case that Tornado gives them; long ones, which anybody may send, are not kept."""

    def __missing__(self, name: str) -> str:
        usual = "-".join(map(str.capitalize, name.split("-")))
        if len(name) <= 100:
            if len(self) >= 1_000:
                self.clear()
            self[name] = usual
        return usual


usual = UsualNames().__getitem__


class Head(NamedTuple):
    """A request's head, its target in origin form."""

    line: RequestStartLine
    headers: Fields
    length: int  # of the body, by Content-Length
    chunked: bool


def check_head(head: bytes) -> bytes:
    """A request's head as Tornado may read it, its target in origin form. Raises ApiError for whatever two readers
    might read differently.
    """
    return check_head_again(head) if len(head) <= REMEMBERED else check_new_head(head)


def check_new_head(head: bytes) -> bytes:
    head = head.lstrip(b"\r\n")
    (method, target, version), block = split_head(head)
    fields = check_fields(block)
    said: dict[str, list[str]] = {"host": [], "content-length": [], "transfer-encoding": []}
    for name, value in FRAMING.findall(fields):
        said[name.lower()].append(value)
    check_framing(version, *said.values())
    if absolute := ABSOLUTE.fullmatch(target):
        host, path = origin_form(method, absolute)
        others = re.sub(r"^host:[^\n]*\n", "", fields, flags=re.IGNORECASE | re.MULTILINE)
        return f"{method} {path} {version}\r\nHost: {host}\r\n{others}".encode("latin-1")
    return head


def parse_head(head: bytes) -> Head:
    """A request's head. Its fields are shared with later requests: who may change them copies them first. Raises
    ApiError as ``check_head`` does.
    """
    return parse_head_again(head) if len(head) <= REMEMBERED else parse_new_head(head)


def parse_new_head(head: bytes) -> Head:
    if head[0] in b"\r\n":
        head = head.lstrip(b"\r\n")
    (method, target, version), block = split_head(head)
    parse = parse_fields_again if len(block) <= REMEMBERED else parse_fields
    fields, length, chunked = parse(block, version)
    if target[0] != "/" and (absolute := ABSOLUTE.fullmatch(target)):
        fields = fields.copy()
        fields["Host"], target = origin_form(method, absolute)
    return Head(RequestStartLine(method, target, version), fields, length, chunked)


def parse_fields(block: bytes, version: str) -> tuple[Fields, int, bool]:
    """The fields behind a request line, the length of the body, and whether it is chunked. Raises ApiError."""
    text = check_fields(block)
    lines = text[:-4].split("\r\n") if len(text) > 2 else []
    headers = Fields()
    for line in lines:
        name, _, value = line.partition(":")
        headers[name] = value.strip("\t ")  # ``add`` would check each once more
    if len(headers) < len(lines):  # a name came twice
        headers.clear()
        for line in lines:
            headers.parse_line(line)
    lengths, codings = headers.get_list("Content-Length"), headers.get_list("Transfer-Encoding")
    check_framing(version, headers.get_list("Host"), lengths, codings)
    return headers, int(lengths[0]) if lengths else 0, bool(codings)


REMEMBERED = 1_024  # bytes: a client says the same of itself with each request, and often asks for the same again
parse_fields_again = functools.lru_cache(500)(parse_fields)
parse_head_again = functools.lru_cache(500)(parse_new_head)
check_head_again = functools.lru_cache(500)(check_new_head)


def split_head(head: bytes) -> tuple[tuple[str, str, str], bytes]:
    """The words of the request line, and what is behind it. Raises ApiError."""
    line = REQUEST_LINE.match(head)
    if not line:
        raise ApiError("REQ_001", MALFORMED)
    method, target, version = head[: line.end() - 2].decode("latin-1").split(" ")
    return (method, target, version), head[line.end() :]


def check_fields(block: bytes) -> str:
    """The lines behind a request line, with the empty one. Raises ApiError.

    Only CRLF ends a line, no line is folded, no field holds a control character (RFC 9112, 2.2 and 5).
    """
    if not FIELDS.fullmatch(block):
        raise ApiError("REQ_001", MALFORMED)
    if block.count(b"\n") > MAX_NUMBER + 1:
        raise ApiError("REQ_004", f"The request may have {MAX_NUMBER} headers", status=431)
    return block.decode("latin-1")


def check_framing(version: str, hosts: list[str], lengths: list[str], codings: list[str]) -> None:
    """Raises ApiError unless it is said once how long the body is, and for which host the request is meant (RFC 9112,
    6.3 and 3.2).
    """
    if len(hosts) > 1 or len(lengths) > 1 or len(codings) > 1:
        raise ApiError("REQ_001", "Host, Content-Length and Transfer-Encoding may come once")
    if not hosts and version == "HTTP/1.1":
        raise ApiError("REQ_001", "The Host header is missing")
    if lengths and (codings or not re.fullmatch(r"[0-9]{1,18}", lengths[0])):
        raise ApiError("REQ_001", "Content-Length must be one number, without Transfer-Encoding")
    if codings and (codings[0].lower() != "chunked" or version == "HTTP/1.0"):
        raise ApiError("REQ_001", "Transfer-Encoding may only be chunked, and only in HTTP/1.1")


def origin_form(method: str, absolute: re.Match[str]) -> tuple[str, str]:
    """Host and target of a request for a whole URL, as proxies get them: its host counts, whatever the Host header says
    (RFC 9112, 3.2.2).
    """
    host, rest = absolute.groups()
    return host, rest if rest[:1] == "/" else "*" if method == "OPTIONS" and not rest else "/" + rest


def cut_head(data: bytes) -> tuple[bytes, bytes]:
    """A request's head at the front of ``data``, nothing where it has not ended, and what is behind it. Raises ApiError
    where it is too long.
    """
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        bare = BARE_END.search(data) if b"\n\n" in data or b"\n\r\n" in data else None  # refused without waiting
        if not bare:
            return b"", data
        end = bare.end()
    head = data[:end]
    if end > MAX_LINE:
        check_size(head)
    return head, data[end:]


def check_size(head: bytes) -> bool:
    """Whether a head, or what has come of it, has a line as long as only those of contexts may be. Raises ApiError
    where it is too long.
    """
    line_end = head.find(b"\n", 2)  # behind an empty line, which is to be ignored (RFC 9112, 2.2)
    line = line_end if line_end >= 0 else len(head)
    if line > MAX_LINE and (line > GetContext.max_line or not OF_CONTEXT.match(head)):
        raise ApiError("REQ_004", TOO_LONG_LINE, status=414)
    if len(head) - line > MAX_FIELDS:
        raise ApiError("REQ_004", TOO_LONG_FIELDS, status=431)
    return line > MAX_LINE


class Fixed:
    """A body whose length is known."""

    def __init__(self, length: int) -> None:
        self._left, self.ended = length, False

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """(bytes of the body, what is behind them)"""
        piece, rest = data[: self._left], data[self._left :]
        self._left -= len(piece)
        self.ended = not self._left
        return piece, rest


SIZE = re.compile(rb"([0-9a-fA-F]{1,16})((?:[\t ]*;[\t -~\x80-\xff]*)?)\r\n")  # of a chunk, with its extension
MAX_SIZE_LINE = 1_024
MAX_EXTENSIONS = 16 * 1024  # bytes of chunk extensions in one body


class Chunks:
    """A chunked body, taken apart as it comes. Extensions are ignored (RFC 9112, 7.1.1), and so are trailers."""

    AT_ONCE = 2_000  # chunks; more are for the loop's next turn

    def __init__(self) -> None:
        self._left = 0  # bytes of the chunk at hand, with its CRLF
        self._extensions = 0
        self._trailers = False
        self.ended = False

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """(bytes of the body, what was not read of ``data``). Raises ApiError for what is malformed."""
        at, pieces = 0, []
        for _ in range(self.AT_ONCE):
            if self._trailers:
                at = self._end(data, at)
                break
            if not self._left:
                size = self._size(data, at)
                if not size:
                    break
                at, self._left = size.end(), int(size[1], 16) + 2
                self._trailers = self._left == 2
                self._left -= 2 * self._trailers
                continue
            piece = data[at : at + max(0, self._left - 2)]
            pieces.append(piece)
            at, self._left = at + len(piece), self._left - len(piece)
            if self._left > 2 or len(data) - at < 2:
                break
            if data[at : at + 2] != b"\r\n":
                raise ApiError("REQ_001", MALFORMED)
            at, self._left = at + 2, 0
        return b"".join(pieces), data[at:]

    def _size(self, data: bytes, at: int) -> re.Match[bytes] | None:
        """The line of a chunk's size; None where it has not ended."""
        size = SIZE.match(data, at, at + MAX_SIZE_LINE)
        self._extensions += len(size[2]) if size else 0
        whole = len(data) - at >= MAX_SIZE_LINE or data.find(b"\n", at, at + MAX_SIZE_LINE) >= 0
        if (whole and not size) or self._extensions > MAX_EXTENSIONS:
            raise ApiError("REQ_001", MALFORMED)
        return size

    def _end(self, data: bytes, at: int) -> int:
        """The place behind the trailers, which have an empty line behind them; ``at`` where that has not come."""
        trailers = FIELDS.match(data, at, at + MAX_LINE)
        end = BARE_END.search(data, at)
        if not trailers and (end or data[at : at + 1] == b"\n" or len(data) - at >= MAX_LINE):
            raise ApiError("REQ_001", MALFORMED)
        self.ended = trailers is not None
        return trailers.end() if trailers else at


def whole_refusal(error: ApiError, request_id: str) -> bytes:
    """An answer with its head, for a line that carries no request."""
    content = msgspec.json.encode(error.answer(request_id))
    headers = {
        "Content-Type": "application/json", "Content-Length": len(content), "Connection": "close",
        "X-Request-ID": request_id,
        "Server": "cco-sidecar", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
        "Cache-Control": "no-store",
    } | ({} if error.retry_after is None else {"Retry-After": error.retry_after})  # fmt: skip
    lines = [
        f"HTTP/1.1 {error.status} {http.client.responses[error.status]}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content
