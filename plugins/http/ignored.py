"""What an endpoint does not know of a query or a body is told, by the header ``X-Ignored`` and in the log.

It is passed over all the same, as by the module alone: a client may be written for a service with more plugins. Not
told are parameters of public endpoints, bodies of endpoints that read none, and fields of events and results.
"""

from __future__ import annotations

import heapq
import logging
import urllib.parse
from collections.abc import Iterable

from cco_sidecar import Endpoint, EventSubmission, ResultSubmission, hookimpl, without_tokens
from cco_sidecar_plugins._words import did_you_mean

log = logging.getLogger("cco")

MAX_TOLD = 10  # names, of this many characters at most
MAX_NAME = 64
KEEPING = (EventSubmission, ResultSubmission)  # what is not named in these is kept


@hookimpl
def part_class(base: type) -> type | None:
    return type("TellingEndpoint", (TellingEndpoint, base), {}) if issubclass(base, Endpoint) else None


class TellingEndpoint(Endpoint):
    def _read_path_and_query(self, path: tuple[str, ...]) -> None:
        given = self.request.query_arguments
        super()._read_path_and_query(path)
        if given and not self.public:  # what asks those adds parameters against caches
            self.tell_ignored(map(as_sent, given), self.query_type)

    async def _read_body(self) -> None:
        await super()._read_body()
        if self.given and not self.aside and self.body not in KEEPING:  # other programs' reports have fields of theirs
            self.tell_ignored(self.given.keys() - {"project_id"}, self.body)

    def tell_ignored(self, given: Iterable[str], shape: object) -> None:
        known = getattr(shape, "__struct_encode_fields__", ())
        if not (unknown := set(given).difference(known)):
            return
        names = heapq.nsmallest(MAX_TOLD, unknown)
        told = {name: urllib.parse.quote(without_tokens(name)[:MAX_NAME]) for name in names}
        self.set_header("X-Ignored", ", ".join([*self._headers.get_list("X-Ignored"), *told.values()]))
        meant = [f"{shown}{did_you_mean(name[:MAX_NAME], known)}" for name, shown in told.items()]
        log.warning("%s passed over: %s", self.request_id, "; ".join(meant))


def as_sent(name: str) -> str:
    """The name of a parameter, of which Tornado reads each byte as a letter."""
    return name if name.isascii() else name.encode("latin-1").decode(errors="replace")
