"""The OpenAPI document against the service: schemathesis generates requests from the one and holds the answers of the
other to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import Service

# Not asked for: that whatever a schema allows is accepted, since none can say which agent types, cursors and filters
# there are; and that Allow is as the document says, where /api/agents/spawn is a path of its own, while to DELETE it is
# an agent's name (test_errors has the table).
COMMAND = [
    "-m", "schemathesis.cli", "run", "--phases", "examples,coverage,fuzzing",
    "--exclude-checks", "positive_data_acceptance,allow_header_conformance", "--continue-on-failure",
    "--request-timeout", "20", "--no-color", "--output-truncate", "true", "--warnings", "off",
]  # fmt: skip


def fuzz_api(service: Service, *arguments: str, seconds: float) -> str:
    """What schemathesis says in the end. Raises AssertionError with all of it where an answer broke the document."""
    command = [
        sys.executable,
        *COMMAND,
        f"{service.url}/openapi.json",
        "-H",
        f"Authorization: Bearer {service.token()}",
        *arguments,
    ]
    here = str(Path(__file__).resolve().parent)
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": here, "COLUMNS": "150"}
    with tempfile.TemporaryDirectory() as folder:  # it writes down what it has done
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=seconds)
    assert done.returncode == 0, shortened(done.stdout + done.stderr)
    assert "Traceback" not in service.log and " unexpected" not in service.log, service.log[-5_000:]
    return shortened(done.stdout)


def shortened(text: str) -> str:
    """Without lines as long as some URLs are."""
    return "\n".join(line[:400] for line in text.splitlines())
