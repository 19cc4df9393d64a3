"""The command ``cco dashboard``: opens the dashboard in the user's browser, with a code that it changes for a token."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from cco_sidecar import GOOD, REFUSED, StartError, hookimpl
from cco_sidecar_plugins.commands._client import Client, Refused
from cco_sidecar_plugins.commands._printing import show
from cco_sidecar_plugins.commands._table import Command, add_commands, arg


@hookimpl
def register_commands(commands: Any) -> None:
    add_commands(commands, {
        "dashboard": Command("open the page that shows the team at work", command_dashboard, [
            arg("--no-open", action="store_true", help="print its address, and open no browser")],
            formats=("table", "json"), section="Start"),
    })  # fmt: skip


def command_dashboard(options: argparse.Namespace) -> int:
    client = Client(options)
    try:
        made = client.call("POST", "/api/dashboard/code")
    except Refused as error:
        if error.status == 404:
            raise StartError("the service has no dashboard: its plugin http/dashboard is not in use", REFUSED) from None
        raise
    url = f"{client.url}/dashboard#code={made['code']}"
    if options.format != "json":
        print(url, flush=True)  # before a browser that may not come back
    opened = not options.no_open and opens(url)
    if options.format == "json":
        return show(options, {"url": url, "expires_at": made["expires_at"], "opened": opened})
    if not opened:
        print("Open it within a minute; it is good once.")
    return GOOD


def opens(url: str) -> bool:
    """Whether a browser was told to open ``url``. One that runs in the terminal is not."""
    import webbrowser  # here alone, since the service loads this file too and needs none

    has_desktop = sys.platform in ("win32", "darwin") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    try:
        return has_desktop and webbrowser.open(url)
    except (webbrowser.Error, OSError, ValueError, IndexError):  # the last two where $BROWSER is no command
        return False
