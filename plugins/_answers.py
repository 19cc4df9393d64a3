"""What the endpoints answer, as types: the OpenAPI document and the JSON Schemas are made from them.

An endpoint names its answers by these names (``answers = {200: "PluginList"}``) and builds them as plain dicts; the
service itself never needs this file. The tests hold every answer to the document.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from cco_sidecar import LoadedPlugin


class ErrorAnswer(Struct, omit_defaults=True):
    """Every error."""

    error: str
    message: str
    code: str
    timestamp: str
    request_id: str
    details: dict[str, Any] | UnsetType = UNSET
    retry_after_seconds: int | UnsetType = UNSET
    limit: int | UnsetType = UNSET


class PluginList(Struct):
    plugins: list[LoadedPlugin]
