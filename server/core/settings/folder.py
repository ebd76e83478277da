"""The data folder: who may write to it and enter it."""

import os
import stat
from pathlib import Path


def make_data_dir(folder: Path) -> None:
    """Create the data folder with mode 0700, because it holds pictures and prompts.

    An existing folder keeps its mode. Raises: ValueError if it cannot be created or written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"data folder {folder} is a file") from error
    except OSError as error:
        user, reason = f"uid {os.geteuid()}", error.strerror
        raise ValueError(f"data folder {folder} cannot be made by {user}: {reason}") from error
    if problem := why_unwritable(folder):
        raise ValueError(f"data folder {problem}")


def why_open(folder: Path) -> str:
    """A warning about the data folder's mode; "" if only this user can enter."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    return f"mode {mode:04o}; chmod 700 {folder}" if mode & 0o077 else ""


def why_unwritable(folder: Path) -> str:
    """Why this process may not write to a folder, with its path and owner; "" if it may."""
    if os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return ""
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{folder} is mounted read-only"
    found = folder.stat()
    return (
        f"{folder} cannot be written by uid {os.geteuid()}: it belongs to uid {found.st_uid}, "
        f"mode {stat.S_IMODE(found.st_mode):04o}"
    )
