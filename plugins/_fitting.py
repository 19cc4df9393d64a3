"""Says in one line where the module and these plugins are not of one version: a file that was copied anew, say, and
plugins that were installed before.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import cco_sidecar


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """Ends the program, wrong use, where one of these plugins wants something of the module that it does not have."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        plugins = os.path.dirname(os.path.realpath(__file__))
        if not is_lacking(error) or not raised_in(error).startswith(os.path.join(plugins, "")):
            raise
        module = os.path.realpath(cco_sidecar.__file__)
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


def raised_in(error: BaseException) -> str:
    """The file whose code raised ``error``; a user's plugin may raise such ones too."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return os.path.realpath(frame.f_code.co_filename)
