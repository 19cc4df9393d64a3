"""Settings as the running service has them."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
from pathlib import Path

import msgspec
import psutil

from cco_sidecar import Settings, SidecarInfo, StartError, default_storage, instance_lock, run_git
from cco_sidecar_plugins._called import own_command
from cco_sidecar_plugins._files import read_sidecar_json
from cco_sidecar_plugins.commands._health import LOCAL_SECONDS, ask_health, read_health, url_of_port


def running_settings(settings: Settings) -> Settings:
    """The settings with the project and storage of the service that runs for this root, which may have been started
    with another project id.
    """
    folders, known = [settings.storage], read_sidecar_json(settings.storage) is not None
    if not known and settings.storage == default_storage(settings.root, settings.project):
        folders += sorted(settings.storage.parent.glob(f"*-{settings.storage.name.rpartition('-')[2]}"))
    for folder in folders:
        if info := read_sidecar_json(folder):
            return msgspec.structs.replace(settings, project=info.project_id, storage=folder)
    return settings


def start_it(settings: Settings) -> str:
    """What to do where no service is announced for the root: start one, or use one that runs nearby; and which one may
    have the port all the same. Blocks.
    """
    known = running_nearby(settings) or unannounced(settings)
    return "; ".join(filter(None, (f"start it with `{own_command(settings)}`", known)))


def unannounced(settings: Settings) -> str:
    """Which service of the project answers on the port and is announced in no storage beside that of the settings; ""
    where none does. Whose it is cannot be seen: the project's name is that of a folder. Blocks.
    """
    health, url = {}, url_of_port(settings)
    if settings.port:
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            health = read_health(ask_health(url, LOCAL_SECONDS)[1])
    if health.get("project_id") != settings.project or health.get("instance_id") in {
        info.instance_id for info in announced(settings)
    }:
        return ""
    why = "its storage is elsewhere or was removed, or another repository has this name"
    return f"a sidecar of project {settings.project} answers on {url}: {why}"


def announced(settings: Settings) -> list[SidecarInfo]:
    """What the services on storages beside that of the settings say of themselves; some may have ended. Blocks."""
    files = settings.storage.parent.glob(f"*/{SidecarInfo.FILE}")
    return [info for file in files if (info := read_sidecar_json(file.parent))]


def running_nearby(settings: Settings) -> str:
    """Which service runs for another work tree of the same repository or for a folder around the root, and how it is
    used; "" where none does, or a storage is named. Blocks.
    """
    if "storage" in settings.places:
        return ""
    trees = work_trees(settings.root)
    for root in (*trees, *settings.root.parents):
        other = settings_of_tree(settings, root)
        if root != settings.root and running_service(other):
            which = "another work tree of this repository" if root in trees else "a folder around it"
            return f"one runs for {root}, {which}: `{own_command(other)}` before a command uses that"
    return running_below(settings)


def work_trees(root: Path) -> list[Path]:
    """Those of the repository around ``root``, the main one first; of a bare repository that is its own folder. Empty
    outside of git. Blocks.
    """
    listed = (run_git(root, "worktree", "list", "--porcelain", "-z") or b"").split(b"\0")
    return [Path(os.fsdecode(line.removeprefix(b"worktree "))) for line in listed if line.startswith(b"worktree ")]


def running_service(settings: Settings) -> SidecarInfo | None:
    """What a service says of itself whose process there is: after a kill -9 it stays announced."""
    info = read_sidecar_json(settings.storage)
    return info if info and psutil.pid_exists(info.pid) else None


def about_silent(settings: Settings) -> str:
    """What to do about the announced service, which let somebody wait, where its process has the storage; "" where no
    process has.
    """
    if not (info := running_service(settings)):
        return ""
    with contextlib.suppress(OSError):  # a disk that takes nothing any more
        if not is_held(settings):  # another process has its pid by now
            return ""
    with contextlib.suppress(psutil.Error):
        if psutil.Process(info.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return f"pid {info.pid} is stopped: `kill -CONT {info.pid}` has it go on"
    again = f"`kill -9 {info.pid}` ends it, then `{own_command(settings)}` starts it again"
    return f"pid {info.pid} runs and does not answer: look again in a moment, it may be busy; else {again}"


def is_held(settings: Settings) -> bool:
    """Whether a process has the storage; none has one that is not there. A start waits while this looks."""
    try:
        with instance_lock(settings.storage):
            return False
    except FileNotFoundError:
        return False
    except StartError:
        return True


def settings_of_tree(settings: Settings, root: Path) -> Settings:
    """As ``running_settings``, for another ``root`` in the place of that of the settings."""
    storage = default_storage(root, settings.project)
    return running_settings(msgspec.structs.replace(settings, root=root, storage=storage, places={"root": "--root"}))


def running_below(settings: Settings) -> str:
    """As ``running_nearby``, of services whose repositories lie in folders below the root."""
    roots = sorted(
        info.root
        for info in announced(settings)
        if settings.root in Path(info.root).parents and psutil.pid_exists(info.pid)
    )
    if not roots:
        return ""
    other = msgspec.structs.replace(settings, root=Path(roots[0]), places={"root": "--root"})
    others = f"; others run for {', '.join(roots[1:])}" if roots[1:] else ""
    return f"one runs for {roots[0]}, a folder in it: `{own_command(other)}` before a command uses that{others}"


def with_secret(settings: Settings) -> Settings:
    """The settings, as soon as their secret is there: within two seconds a running service writes one again that
    somebody has removed. Blocks.
    """
    deadline, folder = time.monotonic() + 2, settings.storage
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline and any(folder.iterdir()) and not (folder / "jwt.secret").exists():
            time.sleep(0.05)
    return settings
