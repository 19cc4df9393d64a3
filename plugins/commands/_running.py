"""Settings as the running service has them."""

from __future__ import annotations

import dataclasses

from cco_sidecar import Settings, default_storage, read_sidecar_json


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
