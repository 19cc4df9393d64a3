"""Tokens are renewed before they end: with every answer of their last five minutes, and by POST /api/auth/refresh.

A new token has the same identity and permissions, never more, and lives as long as the first one did.
"""

from __future__ import annotations

import time
from typing import Any

from cco_sidecar import ApiError, Claims, Endpoint, Route, Tokens, hookimpl, iso
from cco_sidecar_plugins.tokens._foreign import ForeignClaims

RENEWED_SECONDS = 300.0  # before their end


@hookimpl
def register_routes() -> list[Route]:
    return [Route("POST", "/api/auth/refresh", RefreshToken)]


@hookimpl
def part_class(base: type) -> type | None:
    return type("RenewingEndpoint", (RenewingEndpoint, base), {}) if issubclass(base, Endpoint) else None


class RefreshToken(Endpoint):
    """A new token with the same identity, permissions and length of life."""

    answers = {200: "Refreshed"}
    holds_token = True

    async def respond(self) -> dict[str, Any]:
        token, expires = renewed(self.sidecar.tokens, self.claims)
        return {"token": token, "expires_at": iso(expires)}


class RenewingEndpoint(Endpoint):
    """Gives a new token with the answer, where the one that was sent ends soon."""

    def common_headers(self) -> dict[str, str]:
        headers, claims = super().common_headers(), self.claims
        if claims.exp <= time.time() + RENEWED_SECONDS and not isinstance(claims, ForeignClaims):
            headers["X-Refreshed-Token"] = renewed(self.sidecar.tokens, claims)[0]
        return headers


def renewed(tokens: Tokens, claims: Claims) -> tuple[str, int]:
    """A token in the place of one with these claims, and when it expires. Raises AUTH_003."""
    if isinstance(claims, ForeignClaims):  # else it would outlive what its issuer gave, and the issuer's own revocation
        raise ApiError("AUTH_003", "This token was issued elsewhere, and only its issuer refreshes it")
    life = max(1, int(claims.exp - claims.iat))
    same: dict[str, Any] = {"permissions": claims.permissions, "issue_id": claims.issue_id, "bound": claims.bound}
    return tokens.mint(claims.sub, claims.agent_type, ttl=life, **same), int(time.time()) + life
