"""A plugin for tests: files are ranked as they are while the plugin relevance has no index."""

from __future__ import annotations

from cco_sidecar import RankedFile, RankRequest, hookimpl
from cco_sidecar_plugins.context import keywords


@hookimpl
def rank_files(request: RankRequest) -> list[RankedFile]:
    ranked: list[RankedFile] = keywords.rank_files(request)
    return ranked
