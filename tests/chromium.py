"""Chromium for tests, driven over chromedriver's plain HTTP."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import psutil
import requests
from conftest import clean_environment, needed, until

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
 --disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage""".split()


class Browser:
    """Chromium with an empty profile, driven by the W3C's WebDriver protocol."""

    def __init__(self, folder: Path, *arguments: str, **capabilities: Any) -> None:
        self.folder, self.arguments, self.capabilities = folder, arguments, capabilities
        binary, driver = needed("chromium"), needed("chromedriver")
        own = {name: str(folder / name.lower()) for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "TMPDIR")}
        for path in own.values():
            Path(path).mkdir()
        self.log = folder / "chromedriver.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [driver, "--port=0"],
                stdout=output,
                stderr=output,
                env=clean_environment(CCO_TEST_MARK="browser", **own),
            )
        try:
            self._begin(binary)
        except BaseException:
            self._end_driver()
            raise

    def _begin(self, binary: str) -> None:
        port = until(lambda: re.search(r"started successfully on port (\d+)", self.log.read_text()), 30)[1]
        self.url = f"http://127.0.0.1:{port}/session"
        arguments = [*FLAGS, f"--user-data-dir={self.folder / 'profile'}", *self.arguments]
        options = {"binary": binary, "args": arguments}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "timeouts": {"script": 60_000}}
        wanted |= self.capabilities
        self.url += "/" + self.ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = requests.request(method, self.url + path, json=body, timeout=90)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def open(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def run(self, script: str, **names: Any) -> Any:
        """What an async function with this body returns in the page; ``names`` are its arguments."""
        work = f"(async ({', '.join(names)}) => {{{script}}})(...arguments)"
        code = f"const done = arguments[arguments.length - 1]; {work}.then(done, e => done(`thrown: ${{e}}`))"
        return self.ask("POST", "/execute/async", {"script": code, "args": list(names.values())})

    def cdp(self, command: str, **parameters: Any) -> Any:
        """What a command of Chrome's own protocol answers."""
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def press(self, *keys: str) -> None:
        """Keys, one after the other; of those without a sign the WebDriver protocol has the codes."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def click_at(self, x: int, y: int) -> None:
        """A click of the mouse at a point of what is in sight."""
        acts: list[dict[str, Any]] = [{"type": "pointerMove", "x": x, "y": y}]
        acts += [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": acts}]})

    def console(self) -> list[str]:
        """What was written to the console since the last look."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]

    def new_tab(self) -> str:
        """Opens a tab and goes to it; the tab that one was in."""
        before = str(self.ask("GET", "/window"))
        self.ask("POST", "/window", {"handle": self.ask("POST", "/window/new", {"type": "tab"})["handle"]})
        return before

    def close_tab(self, back_to: str) -> None:
        self.ask("DELETE", "/window")
        self.ask("POST", "/window", {"handle": back_to})

    def frame_source(self, number: int) -> str:
        """The text of a frame of the page, which the driver may read although no page can."""
        self.ask("POST", "/frame", {"id": number})
        source = self.ask("GET", "/source")
        self.ask("POST", "/frame", {"id": None})
        return str(source)

    def close(self) -> None:
        """Ends it; no process of it is left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.ask("DELETE", "")
        self._end_driver()
        assert not psutil.wait_procs(family, 15)[1]

    def _end_driver(self) -> None:
        self.process.terminate()
        self.process.wait(15)
