"""One run at a time writes into an output folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sdkit.errors import ConfigError


@contextmanager
def output_lock(output: Path) -> Generator[None]:
    """Make the folder ``output``, and keep other processes from training into it while the block runs.

    The lock is flock's, on the folder itself; a file system that has none for folders, such as NFS, goes without.
    Raises ConfigError where another process holds it, or the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        folder = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"output: {output}: cannot be written ({error.strerror})") from None

    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"output: another process is training into {output}; wait for it, or choose another folder"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(folder)
