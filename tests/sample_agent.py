"""A stand-in for a coding agent. The first word of its task says what it does; it uses the standard library alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

FOREVER = 600
SLEEPER = [sys.executable, "-c", f"import time; time.sleep({FOREVER})"]


def call(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request to the service with the token of the moment."""
    token = Path(os.environ["CCO_TOKEN_FILE"]).read_text()
    request = urllib.request.Request(
        os.environ["SIDECAR_URL"] + path, None if body is None else json.dumps(body).encode()
    )
    request.add_header("Authorization", f"Bearer {token}")
    request.add_header("Content-Type", "application/json")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def store(status: str = "success", **result: Any) -> dict[str, Any]:
    who = {name.lower(): os.environ[name] for name in ("AGENT_ID", "AGENT_TYPE", "ISSUE_ID", "PROJECT_ID")}
    return call("/results", who | {"result": {"status": status, **result}})


def succeed() -> None:
    print("done")


def fail() -> None:
    print("something went wrong", file=sys.stderr)
    sys.exit(3)


def hang() -> None:
    print("hanging", flush=True)
    time.sleep(FOREVER)


def family() -> None:
    """Children and a grandchild, all of whom sleep."""
    shell = f"{SLEEPER[0]} -c 'import time; time.sleep({FOREVER})' & wait"
    subprocess.Popen(["/bin/sh", "-c", shell])
    subprocess.Popen(SLEEPER)
    print("family", flush=True)
    time.sleep(FOREVER)


def escape() -> None:
    """A grandchild in a session of its own whose parent is gone."""
    start = f"import subprocess, sys; subprocess.Popen({SLEEPER!r}, start_new_session=True)"
    subprocess.run([sys.executable, "-c", start], check=True)
    print("escaped", flush=True)


def escape_and_hang() -> None:
    escape()
    time.sleep(FOREVER)


def ignore() -> None:
    """Not to be moved by SIGTERM, nor is its child, which inherits that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(SLEEPER)
    print("ignoring", flush=True)
    while True:
        time.sleep(FOREVER)


def vanish() -> None:
    """A daemon as daemons are made: forked twice, a session of its own, another folder, no environment, and no file
    that we know.
    """
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.execve("/bin/sleep", ["sleep", os.environ["NAP"]], {})
    os._exit(0)
os.wait()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    print("vanished", flush=True)


def vanish_and_hang() -> None:
    vanish()
    time.sleep(FOREVER)


def flood() -> None:
    """As many bytes as $BYTES says, in lines."""
    left, line = int(os.environ["BYTES"]), b"x" * 99 + b"\n"
    while left > 0:
        left -= os.write(1, line * min(1000, left // 100 + 1))
    print("flooded", flush=True)


def flood_beside_own_files() -> None:
    """The same, once files of its own are beside what it writes, which are called nearly so."""
    folder = Path(os.environ["CCO_TOKEN_FILE"]).parent
    for name in ("output.log", "output.old.log", "output.-1.log"):
        (folder / name).write_text("its own\n")
    (folder / "output.5.log").mkdir()
    (folder / "output.6.log").symlink_to("token")
    os.mkfifo(folder / "output.7.log")
    flood()


def one_line() -> None:
    """Ten megabytes without an end of line."""
    for _ in range(160):
        os.write(1, b"y" * 65536)


def pieces() -> None:
    """A line that comes in pieces, the second one when a file says so, and a character cut in two."""
    os.write(1, b"one ")
    while not Path(os.environ["TEST_GATE"]).exists():
        time.sleep(0.01)
    os.write(1, b"line\nanother \xc3")
    time.sleep(0.2)
    os.write(1, b"\xa9\n")


def wait() -> None:
    """Until a file says so; then does what $TEST_THEN says."""
    print("waiting", flush=True)
    while not Path(os.environ["TEST_GATE"]).exists():
        time.sleep(0.01)
    globals()[os.environ["TEST_THEN"]]()


def lie() -> None:
    """Writes down in its keeper's name that all went well, puts something in the way of the truth, and fails."""
    folder = Path(os.environ["CCO_TOKEN_FILE"]).parent
    (folder / "exit").write_text(json.dumps({"code": 0, "cpu": 0, "memory": 0, "time": time.time()}))
    os.mkfifo(folder / "exit~")
    fail()


def mislead() -> None:
    """Puts what cannot be read in the place of what it wrote: as $TEST_WITH says."""
    print("misleading", flush=True)
    folder = Path(os.environ["CCO_TOKEN_FILE"]).parent
    while not (found := [path for path in folder.glob("output*.log") if path.stat().st_size]):
        time.sleep(0.01)
    for path in found:
        path.unlink()
        if os.environ["TEST_WITH"] == "a folder":
            path.mkdir()
        elif os.environ["TEST_WITH"] == "a pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(os.environ["TEST_WITH"])
    (folder / "output.x.log").touch()
    (folder / "misled").touch()


def spawn_another() -> None:
    """Another one like oneself, and so on; what the service says to that."""
    body = {"agent_type": os.environ["AGENT_TYPE"], "issue_id": os.environ["ISSUE_ID"], "task": os.environ["TASK"]}
    try:
        print("spawned", call("/agents/spawn", body)["agent_id"])
    except urllib.error.HTTPError as error:
        print(error.code, error.read().decode())


def spawn_in_a_loop() -> None:
    """As many as it gets."""
    body = {"agent_type": "python-specialist", "issue_id": os.environ["ISSUE_ID"], "task": "succeed"}
    for number in range(1000):
        try:
            call("/agents/spawn", body)
        except urllib.error.HTTPError as error:
            problem = json.loads(error.read())
            if problem.get("retry_after_seconds"):  # for the moment there are too many at once
                time.sleep(0.05)
                continue
            print(number, problem["code"], problem["message"])
            return


def lose_token() -> None:
    """Deletes its token file, and waits for it to come back."""
    path = Path(os.environ["CCO_TOKEN_FILE"])
    path.unlink()
    while not path.exists():
        time.sleep(0.01)
    print(call("/auth/refresh", {})["token"] != "", flush=True)


def curl() -> None:
    """Stores a result as the prompt says: with curl, its header file and no token in an argument."""
    who = {name.lower(): os.environ[name] for name in ("AGENT_ID", "AGENT_TYPE", "ISSUE_ID", "PROJECT_ID")}
    command = ["curl", "-sS", os.environ["SIDECAR_URL"] + "/results", "-H", "@" + os.environ["CCO_HEADER_FILE"]]
    subprocess.run(
        [*command, "-H", "Content-Type: application/json", "-d", json.dumps(who | {"result": {"status": "success"}})],
        check=True,
    )


def burn() -> None:
    """Half a second of processor time, by a child that has ended, and 50 MB held."""
    held = bytearray(50_000_000)
    code = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    print("burnt", len(held), flush=True)
    time.sleep(FOREVER)


def write() -> None:
    for number in range(20_000):
        print(f"line {number}")


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def report() -> None:
    """Its arguments, environment and working directory. Of its token, which the log would not show, each 40th sign."""
    environment = os.environ | {"JWT_TOKEN": os.environ["JWT_TOKEN"][::60]}
    print(json.dumps({"argv": sys.argv[1:], "environment": environment, "cwd": os.getcwd()}))


def store_and_hang() -> None:
    store()
    print("stored", flush=True)
    time.sleep(FOREVER)


def edit() -> None:
    """Changes the repository as $EDIT says, and writes $SAY."""
    subprocess.run(["/bin/sh", "-e", "-c", os.environ.get("EDIT", "")], check=True)
    os.write(1, os.environ.get("SAY", "edited\n").encode())


def store_at_last() -> None:
    """Sends its result and ends, without waiting for an answer."""
    who = {name.lower(): os.environ[name] for name in ("AGENT_ID", "AGENT_TYPE", "ISSUE_ID", "PROJECT_ID")}
    body = json.dumps(who | {"result": {"status": "success"}}).encode()
    host, path = os.environ["SIDECAR_URL"].removeprefix("http://").split("/", 1)
    head = f"POST /{path}/results HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {os.environ['JWT_TOKEN']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection((host.split(":")[0], int(host.split(":")[1])))
    connection.sendall(head.encode() + body)


def spend() -> None:
    """Reports what $REPORT says as its program would, and ends at once."""
    name, _, given = os.environ["OTEL_EXPORTER_OTLP_HEADERS"].partition("=")
    headers = {name: given, "Content-Type": "application/json"}
    body = os.environ["REPORT"].encode()
    request = urllib.request.Request(os.environ["OTEL_EXPORTER_OTLP_LOGS_ENDPOINT"], body, headers)
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30).close()


def work() -> None:
    """The whole day of an agent: context, progress, result."""
    issue, agent_type = os.environ["ISSUE_ID"], os.environ["AGENT_TYPE"]
    context = call(f"/context/{issue}/{agent_type}")["context"]
    injected = json.loads(Path(os.environ["CCO_CONTEXT_FILE"]).read_text())["context"]
    seen = {
        "files": len(context["relevant_files"]),
        "injected": sorted(injected),
        "branch": context["git_context"]["branch"],
    }
    earlier = [output["decision"] for output in context["previous_agent_outputs"]]
    call(
        "/events/progress",
        {"publisher": os.environ["AGENT_ID"], "topic": "progress", "data": {"issue_id": issue, "seen": seen}},
    )
    stored = store(files_modified=["src/main.py"], decisions=[f"{agent_type} has worked"], rationale=f"after {earlier}")
    print(f"stored {stored['id']}")


if __name__ == "__main__":
    globals()[os.environ["TASK"].split()[0]]()
