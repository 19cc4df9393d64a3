"""Asks the hook ``permission_policy`` about each request that its token allows."""

from __future__ import annotations

import typing
from typing import Any

from cco_sidecar import MB, ApiError, Endpoint, forbidden


class PolicedEndpoint(Endpoint):
    """Refuses what a policy refuses, before the body is read."""

    async def prepare(self) -> None:
        await super().prepare()
        if self.public or self.error:
            return
        try:
            await self.check_policies()
        except ApiError as error:
            self.error = error
            length = self.request.headers.get("Content-Length", "0")
            if "Transfer-Encoding" in self.request.headers or not length.isdecimal() or int(length) > MB:
                self.answer_early(error)

    async def check_policies(self) -> None:
        """Raises AUTH_003 where a policy refuses what the token allows."""
        hooks, request = typing.cast(Any, self.sidecar.hooks), self.request
        asked = hooks.pool.run(
            hooks.refusal, claims=self.claims, permission=self.permission, method=request.method, path=request.path
        )
        if reason := await asked:
            raise forbidden(f"Refused by policy: {reason}", permission=self.permission, policy=reason)
