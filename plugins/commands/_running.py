"""Settings as the running service has them."""

from __future__ import annotations

import contextlib
import dataclasses
import time

from cco_sidecar import Settings, default_storage
from cco_sidecar_plugins._files import read_sidecar_json


def running_settings(settings: Settings) -> Settings:
    """The settings with the project and storage of the service that runs for this root, which may have been started
    with another project id.
    """
    folders, known = [settings.storage], read_sidecar_json(settings.storage) is not None
    if not known and settings.storage == default_storage(settings.root, settings.project):
        folders += sorted(settings.storage.parent.glob(f"*-{settings.storage.name.rpartition('-')[2]}"))
    for folder in folders:
        if info := read_sidecar_json(folder):
            return dataclasses.replace(settings, project=info.project_id, storage=folder)
    return settings


def with_secret(settings: Settings) -> Settings:
    """The settings, as soon as their secret is there: within two seconds a running service writes one again that
    somebody has removed. Blocks.
    """
    deadline, folder = time.monotonic() + 2, settings.storage
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline and any(folder.iterdir()) and not (folder / "jwt.secret").exists():
            time.sleep(0.05)
    return settings
