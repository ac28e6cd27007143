"""Writing so that a crash, a full disk or a second writer leaves nothing half done."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from qlora_contract import places
from qlora_contract.run import RunConfig, config_hash, differences, run_shaping_fields
from qlora_trainer.errors import ConfigurationError, Fenced, StorageFull, from_os_error

if TYPE_CHECKING:
    from torch import Tensor

SET_ASIDE = ".old.tmp"


@contextmanager
def storing(doing: str) -> Iterator[None]:
    """Turn what is foreseen of a disk, above all that it is full, into an error of ours (see from_os_error)."""
    try:
        yield
    except OSError as error:
        known = from_os_error(error, doing)
        if known is None:
            raise
        raise known from error


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def make_folder(path: Path) -> None:
    """Make a folder, and those above it."""
    with storing(f"making {path}"):
        path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by a whole one, or leave the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with storing(f"writing {path}"):
            temporary.write_text(text)
            sync_file(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(tensors: "dict[str, Tensor]", path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and make it durable. A full disk is the OSError it is, not safetensors' own error."""
    from safetensors.torch import save_file  # transfers use the rest of this module, without torch

    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error
    sync_file(path)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def publish_folder(folder: Path, extra: dict[str, Any]) -> None:
    """Make a folder's files durable, then write manifest.json, the mark of a whole folder, as the last of them.

    It holds the sha256 of each file, and `extra`.
    """
    files = sorted(path for path in folder.iterdir() if path.name != places.MANIFEST)
    for path in files:
        sync_file(path)
    manifest = {**extra, "files": {path.name: sha256(path) for path in files}}
    write_atomically(folder / places.MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`, durably.

    What was there is set aside first, as a whole: no half of it is ever seen
    under its name. After a crash in between, `tidy` puts it back.
    """
    old = final.with_name(f".{final.name}{SET_ASIDE}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Deal with what attempts that were killed while they wrote left under temporary names."""
    for path in folder.glob(f".*{SET_ASIDE}"):
        final = folder / path.name.removeprefix(".").removesuffix(SET_ASIDE)
        if not final.exists():
            path.rename(final)
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder whose files are all there and unchanged; None otherwise."""
    try:
        manifest: dict[str, Any] = json.loads((folder / places.MANIFEST).read_text())
        whole = all(sha256(folder / name) == digest for name, digest in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return manifest if whole else None


def job_uri(run: RunConfig, *names: str) -> str:
    """The URI of something in the job's folder."""
    return "/".join([run.workspace.rstrip("/"), "jobs", run.job.name, *names])


def adapter_uri(run: RunConfig) -> str:
    """The URI of the published adapter."""
    return job_uri(run, places.ADAPTER)


class JobFolder:
    """`jobs/<name>` of a workspace: whose it is, and who may write to it."""

    def __init__(self, path: Path, run: RunConfig) -> None:
        self.path = path
        self.run = run

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / places.CHECKPOINTS

    @property
    def adapter(self) -> Path:
        """Where the published adapter is."""
        return self.path / places.ADAPTER

    def claim(self) -> None:
        """Rank 0, at the start: make the folder, check that it belongs to this spec, set the fence, tidy up.

        Raises:
            ConfigurationError: it holds another spec's results; says what differs.
            Fenced: a newer attempt of this job is at work.
            StorageFull: not even these small files fit.
        """
        with storing(f"making {self.path}"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.check_identity()
        uid, attempt = self._fence()
        job = self.run.job
        if uid == job.uid and attempt > job.attempt:
            raise Fenced(f"attempt {attempt} has taken over; this is attempt {job.attempt}")
        write_atomically(self.path / places.FENCE, json.dumps({"uid": job.uid, "attempt": job.attempt}))
        for folder in (self.path, self.checkpoints):
            tidy(folder)

    def check_identity(self) -> None:
        """Write down which spec the folder belongs to, or compare with what stands there."""
        fields = run_shaping_fields(self.run)
        mine = {"hash": config_hash(fields), "fields": fields}
        path = self.path / places.IDENTITY
        if not path.exists():
            write_atomically(path, json.dumps(mine, indent=1))
            return
        try:
            theirs = json.loads(path.read_text())
            same, other = theirs["hash"] == mine["hash"], theirs["fields"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"{path} is damaged; remove {self.path} to start anew") from error
        if not same:
            raise ConfigurationError(
                f"{self.path} holds the results of another spec ({differences(other, fields)}); "
                "choose another metadata.name, or remove the folder"
            )

    def finished(self) -> bool:
        """Whether the adapter of this very spec is published, with its report."""
        return read_manifest(self.adapter) is not None and (self.path / places.TRAINING_REPORT).is_file()

    def report(self) -> dict[str, Any]:
        """training_report.json of a finished job."""
        report: dict[str, Any] = json.loads((self.path / places.TRAINING_REPORT).read_text())
        return report

    def check_fence(self) -> None:
        """Raises Fenced unless the fence still names this attempt."""
        uid, attempt = self._fence()
        if (uid, attempt) != (self.run.job.uid, self.run.job.attempt):
            owner = (
                f"now belongs to attempt {attempt} of job {uid}" if uid else "has no fence that can be read"
            )
            raise Fenced(f"{self.path} {owner}; nothing more is written to it")

    def check_space(self, needed: int) -> None:
        """Raises StorageFull when fewer than `needed` bytes are free."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise StorageFull(
                f"{self.path} has {free / 2**20:.0f} MiB free; checkpoints and adapter need {needed / 2**20:.0f} MiB"
            )

    def _fence(self) -> tuple[str, int]:
        """(job uid, attempt) that the fence names; ("", -1) when it names nobody."""
        try:
            fence = json.loads((self.path / places.FENCE).read_text())
            return str(fence["uid"]), int(fence["attempt"])
        except (OSError, ValueError, KeyError, TypeError):
            return "", -1
