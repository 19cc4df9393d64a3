"""Facts about agents which cco_sidecar's earlier versions kept as JSON in columns of their own."""

from __future__ import annotations

import json
from typing import Any


def fact(row: dict[str, Any], name: str) -> Any:
    """What an agent's row says, None where it says nothing."""
    value = row.get(name)
    return json.loads(value) if isinstance(value, str) else value
