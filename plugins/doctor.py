"""The command ``doctor``: what most often keeps the service from working, and what to do about each."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from typing import Any

import psutil
import tornado.netutil

import cco_sidecar
from cco_sidecar import GOOD, MB, REFUSED, Command, Settings, StartError, add_commands, hookimpl, read_sidecar_json, settings_from, show


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, {"doctor": Command("check what the service needs, and say what to do", command_doctor)})


def command_doctor(options: argparse.Namespace) -> int:
    """Check what the service needs, say what to do; exit code 1 where something is wrong."""
    settings = cco_sidecar.running_settings(settings_from(options))
    findings = {name: examine(check, settings) for name, check in DOCTOR_CHECKS.items()}
    rows = [{"check": name, "verdict": verdict, "finding": finding} for name, (verdict, finding) in findings.items()]
    show(options, {"checks": rows}, "checks")
    return REFUSED if any(row["verdict"] == "bad" for row in rows) else GOOD


def examine(check: Callable[[Settings], str], settings: Settings) -> tuple[str, str]:
    try:
        finding = check(settings)
    except (StartError, OSError) as error:
        return "bad", str(error)
    return ("note", finding[6:]) if finding.startswith("note: ") else ("good", finding)


def check_storage(settings: Settings) -> str:
    if not settings.storage.exists():
        return "note: not there yet; the first start makes it"
    facts = settings.storage.lstat()
    if hasattr(os, "geteuid") and (facts.st_uid != os.geteuid() or facts.st_mode & 0o077):
        raise StartError(f"{settings.storage} must be yours alone: chown it to yourself and chmod 700 it")
    cco_sidecar.check_database(settings.storage / cco_sidecar.Storage.FILE, thorough=True)
    free = shutil.disk_usage(settings.storage).free
    if free < 100 * MB:
        raise StartError(f"only {free // MB} MB are free on the disk of {settings.storage}: make room")
    return f"{settings.storage}, database sound, {free // MB} MB free"


def check_secret(settings: Settings) -> str:
    path = settings.storage / "jwt.secret"
    if settings.jwt_secret:
        return "given by configuration"
    if not path.exists():
        return "note: not there yet; the first start or token makes it"
    if hasattr(os, "geteuid") and path.stat().st_mode & 0o077:
        raise StartError(f"others can read {path}: chmod 600 it, or delete it to end all tokens")
    cco_sidecar.make_or_read_secret(path)
    return "there, for you alone"


def check_lock(settings: Settings) -> str:
    if not (settings.storage / "lock").exists():
        return "free"
    try:
        cco_sidecar.InstanceLock(settings.storage).release()
    except StartError as error:
        return f"note: {error}"
    return "free"


def check_port(settings: Settings) -> str:
    info = read_sidecar_json(settings.storage)
    if info and psutil.pid_exists(info.pid):
        return f"the running service answers on {info.url}"
    try:
        for listener in tornado.netutil.bind_sockets(settings.port, settings.host):
            listener.close()
    except OSError as error:
        raise StartError(cco_sidecar.explain_bind_error(settings, error)) from None
    return f"{settings.host} port {settings.port} is free"


def check_git(settings: Settings) -> str:
    if not shutil.which("git"):
        return "note: git is not installed: contexts carry no history, and .gitignore is not honoured; install it"
    if not cco_sidecar.find_git_folder(settings.root):
        if (settings.root / ".git").exists():
            return f"note: git refuses {settings.root}, often because it belongs to another user: `git -C {settings.root} status` says why"
        return f"note: {settings.root} is no git repository; `git init` gives it history"
    return f"repository at {settings.root}"


def check_watcher(settings: Settings) -> str:
    folders, limit = cco_sidecar.count_folders(settings.root), cco_sidecar.watch_limit()
    watched = min(limit // 2, cco_sidecar.Watcher.BUDGET)
    if folders > watched:
        return (
            f"note: {folders} folders, watched are {watched} at most; contexts stay fresh by the check against the disk."
            " More: sysctl fs.inotify.max_user_watches=524288"
        )
    return f"{folders} folders of {limit} that may be watched"


def check_plugins(settings: Settings) -> str:
    hooks = cco_sidecar.load_hooks(settings)
    skipped = [f"{plugin.name}: {plugin.problem}" for plugin in hooks.loaded if plugin.problem]
    if skipped:
        return f"note: skipped {'; '.join(skipped)}"
    return f"{sum(plugin.source != 'built in' for plugin in hooks.loaded)} loaded besides the built-in ones"


DOCTOR_CHECKS: dict[str, Callable[[Settings], str]] = {
    "storage": check_storage, "secret": check_secret, "lock": check_lock, "port": check_port,
    "git": check_git, "watcher": check_watcher, "plugins": check_plugins,
}  # fmt: skip
