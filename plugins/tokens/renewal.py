"""Tokens are renewed before they end: with every answer of their last five minutes, by POST /api/auth/refresh, and in
the files of a running agent.

A new token has the same identity and permissions, never more, and lives as long as the first one did.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from pathlib import Path
from typing import Any

from cco_sidecar import (
    AgentCommand,
    AgentLaunch,
    Agents,
    ApiError,
    Claims,
    Endpoint,
    Launcher,
    Route,
    Running,
    Tokens,
    hookimpl,
    iso,
    log,
    write_file,
)
from cco_sidecar_plugins.tokens._foreign import ForeignClaims

RENEWED_SECONDS = 300.0  # before their end


@hookimpl
def register_routes() -> list[Route]:
    return [Route("POST", "/api/auth/refresh", RefreshToken)]


@hookimpl
def part_class(base: type) -> type | None:
    table = {Endpoint: RenewingEndpoint, Agents: RenewingAgents, Launcher: ShortLauncher}
    own = next((own for part, own in table.items() if issubclass(base, part)), None)
    return type(own.__name__, (own, base), {}) if own else None


class RefreshToken(Endpoint):
    """A new token with the same identity, permissions and length of life."""

    answers = {200: "Refreshed"}
    holds_token = True

    async def respond(self) -> dict[str, Any]:
        if self.claims.exp <= time.time():  # while the rest of the request came
            raise ApiError("AUTH_002")
        token, expires = renewed(self.sidecar.tokens, self.claims)
        return {"token": token, "expires_at": iso(expires)}


class RenewingEndpoint(Endpoint):
    """Gives a new token with the answer, where the one that was sent ends soon."""

    def common_headers(self) -> dict[str, str]:
        headers, claims = super().common_headers(), self.claims
        if 0 < claims.exp - time.time() <= RENEWED_SECONDS and not isinstance(claims, ForeignClaims):
            headers["X-Refreshed-Token"] = renewed(self.sidecar.tokens, claims)[0]
        return headers


def renewed(tokens: Tokens, claims: Claims) -> tuple[str, int]:
    """A token in the place of one with these claims, and when it expires. Raises AUTH_003."""
    if isinstance(claims, ForeignClaims):  # else it would outlive what its issuer gave, and the issuer's own revocation
        raise ApiError("AUTH_003", "This token was issued elsewhere, and only its issuer refreshes it")
    life = max(1, int(claims.exp - claims.iat))
    same: dict[str, Any] = {"permissions": claims.permissions, "issue_id": claims.issue_id, "bound": claims.bound}
    return tokens.mint(claims.sub, claims.agent_type, ttl=life, **same), int(time.time()) + life


class ShortLauncher(Launcher):
    """Gives agents tokens that live as long as others do, in files that curl reads too."""

    def token(self, row: dict[str, Any], ttl: int = 0) -> str:
        return super().token(row, ttl or self.settings.token_ttl)

    async def command(self, running: Running, files: dict[str, bytes], asked: dict[str, str]) -> AgentCommand:
        command = await super().command(running, files, asked)
        command.environment["CCO_HEADER_FILE"] = str(running.folder / "header")
        return command

    def _prepare(self, launch: AgentLaunch, files: dict[str, bytes]) -> AgentCommand:
        return super()._prepare(launch, files | token_files(launch.agent_folder, files["token"].decode()))


# How curl reads a text in quotes.
IN_CURL = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t", "\v": r"\v"})


def token_files(folder: str | Path, token: str) -> dict[str, bytes]:
    """A token by file: alone and as a header (as an argument others would see it), and curl's configuration, which only
    names the header's file: prompts name it, and some programs read what a prompt names into the conversation.
    """
    header = str(Path(folder, "header")).translate(IN_CURL)
    curl = f'header = "@{header}"\nheader = "Content-Type: application/json"\n'
    return {"token": token.encode(), "header": f"Authorization: Bearer {token}\n".encode(), "curl": curl.encode()}


class RenewingAgents(Agents):
    """Renews the token of a running agent in its files, also where they are gone, and removes them at its end."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._renewed: weakref.WeakKeyDictionary[Running, float] = weakref.WeakKeyDictionary()  # epoch seconds
        self.processes.LOOK = min(self.processes.LOOK, self.settings.token_ttl / 4)  # so that it never runs out

    async def tend(self, running: Running) -> None:
        await super().tend(running)
        wait = self.settings.token_ttl - min(600.0, self.settings.token_ttl / 2)
        age = time.time() - self._renewed.get(running, running.row["started"])
        there = running.token and os.path.exists(f"{running.folder}/token")  # an adopted one has no token yet
        if there and 0 <= age < wait:  # by a clock that was set back it was made in the future, and is refused
            return
        running.token, self._renewed[running] = self.launcher.token(running.row), time.time()
        try:
            for name, content in token_files(running.folder, running.token).items():
                await self.disk.run(write_file, running.folder / name, content)
        except OSError as error:
            self._renewed[running] += 1 - wait  # again in a second
            log.warning("agent %s: its token file cannot be written: %s", running.row["id"], error.strerror)

    async def judge(self, running: Running) -> None:
        await super().judge(running)
        for name in token_files(running.folder, ""):
            with contextlib.suppress(OSError):
                await self.disk.run((running.folder / name).unlink)
