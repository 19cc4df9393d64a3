"""Claims of tokens that another issuer signed."""

from __future__ import annotations

from cco_sidecar import Claims


class ForeignClaims(Claims, frozen=True, kw_only=True):
    """Verified with another issuer's key, who alone renews and revokes the token."""
