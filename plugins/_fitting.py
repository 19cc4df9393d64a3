"""Says in one line where the module and these plugins are not of one version: a file that was copied anew, say, and
plugins that were installed before.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import cco_sidecar


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """Ends the program, wrong use, where a plugin wants something of the module that it does not have."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        if not is_lacking(error):
            raise
        module, plugins = os.path.realpath(cco_sidecar.__file__), os.path.dirname(os.path.realpath(__file__))
        why = str(error).partition(" from ")[0]
        sys.stderr.write(
            f"cco: {module} (version {cco_sidecar.__version__}) and the plugins in {plugins} do not fit: {why};"
            " take both from one checkout: copy its plugins/ beside the file, or run `pip install .` in it\n"
        )
        sys.exit(2)


def is_lacking(error: ImportError | AttributeError) -> bool:
    if isinstance(error, AttributeError):
        return error.obj is cco_sidecar
    return error.name in ("cco_sidecar", "__main__") and error.path == cco_sidecar.__file__
