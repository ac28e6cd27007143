"""Files and folders that are replaced as a whole: a crash or a full disk leaves the old one or the new one.

A folder is complete once its manifest is written (`seal_folder`); `replace_folder` swaps complete folders, and
`recover` repairs what a process that was killed in between has left.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_contract import files
from qlora_contract.job_folder import MANIFEST
from qlora_trainer.errors import from_os_error

BACKUP_SUFFIX = ".old.tmp"
"""Of a folder that is being replaced."""


@contextmanager
def translate_os_errors(doing: str) -> Iterator[None]:
    """Raise the OSErrors that disks are known for as errors of ours; let others pass.

    Args:
        doing: what the block does, for the message: `writing /volumes/data/x`.

    Raises:
        StorageFull, ConfigurationError, OutOfMemory: see errors.from_os_error.
    """
    try:
        yield
    except OSError as error:
        known = from_os_error(error, doing)
        if known is None:
            raise
        raise known from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents, durably. Raises as translate_os_errors does."""
    with translate_os_errors(f"making {path}"):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            files.sync_folder(folder.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file durably (qlora_contract.files). Raises as translate_os_errors does."""
    with translate_os_errors(f"writing {path}"):
        files.write_atomically(path, text)


def seal_folder(folder: Path, extra: dict[str, Any]) -> None:
    """Make a folder's files durable, then write manifest.json, which marks the folder as complete.

    Args:
        folder: holds files only.
        extra: goes into the manifest, beside the sha256 of each file.
    """
    members = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    for path in members:
        files.sync_file(path)
    manifest = {**extra, "files": {path.name: files.sha256(path) for path in members}}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`, durably.

    A folder cannot be renamed over another: what was there becomes a backup first, so that `final` is never half of
    each. After a crash between the two renames, `recover` puts the backup back.
    """
    backup = final.with_name(f".{final.name}{BACKUP_SUFFIX}")
    shutil.rmtree(backup, ignore_errors=True)
    if final.exists():
        final.rename(backup)
    new.rename(final)
    files.sync_folder(final.parent)
    shutil.rmtree(backup, ignore_errors=True)


def recover(folder: Path) -> None:
    """Restore backups whose replacement never came, and remove what killed attempts left under temporary names."""
    for path in folder.glob(f".*{BACKUP_SUFFIX}"):
        final = folder / path.name.removeprefix(".").removesuffix(BACKUP_SUFFIX)
        if not final.exists():
            path.rename(final)
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
