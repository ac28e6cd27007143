"""The token cache of a workspace: what was tokenized once is mapped by all ranks of a pod, and by later jobs.

    cache/tokens/<key>/meta.json            what is there; written last
    cache/tokens/<key>/training/...         arrays, as samples.SampleWriter writes them
    cache/tokens/<key>/evaluation/...
    cache/tokens/.<key>.<job uid>.<attempt>.<pod>.tmp/     one that is being written

The key is a hash of everything that decides about tokens, the trainer's own code among it, so nothing in the cache is
ever wrong, and all of it may be removed at any time. What was damaged is told by the digests of the tokens, and made
anew. Who uses an entry holds a shared lock on its meta.json, whose time of change is that of its last use. Where room
runs short, what nobody has used for long is removed. A workspace without room, or that cannot be written to, costs time
and memory, and no job.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_contract import files
from qlora_contract.files import read_json
from qlora_contract.run_config import Dataset
from qlora_contract.units import format_bytes
from qlora_trainer.data.dataset import Facts, LoadedData
from qlora_trainer.data.samples import ARRAYS, mapped
from qlora_trainer.data.tokenization import Tokenization, TokenizationOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FOLDER = "cache/tokens"
"""In a workspace."""
META = "meta.json"
FORMAT = 1
"""Of META and of what stands beside it."""
ABANDONED_SECONDS = 86_400
"""After which what nobody has written to is no more being written."""
ROOM = 2
"""Bytes that must be free for each of the data: tokens take 1.25 times a text's, and checkpoints come after them."""
UNUSED_SECONDS = 7 * 86_400
"""After which an entry may be removed where room runs short. Locks do not reach across every kind of volume."""
MAX_SHARE = 0.25
"""Of the workspace's file system, for all tokens together: beyond it, too, what was not used for long is removed."""
TOKEN_SHARE = 1.25
"""Bytes of tokens for each of the data."""
LIBRARIES = ("jinja2", "numpy", "pyarrow", "tokenizers", "transformers")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


class TokenCache:
    """The cache of a workspace, as one process of a job uses it."""

    def __init__(self, workspace: Path, writer: tuple[str, int, int]) -> None:
        """`writer`: the job's uid, its attempt and the pod: of these no two processes write at once."""
        self.folder = workspace / FOLDER
        self._writer = writer

    def read(self, key: str, tokenization: Callable[[], Tokenization]) -> LoadedData | None:
        """What the cache has under a key; None when it has nothing that is whole.

        Args:
            key: by cache_key.
            tokenization: makes what the template is taken from, where one was used.
        """
        folder = self.folder / key
        use = _Use.of(folder / META)
        try:
            meta = read_json(folder / META)
            if meta["format"] != FORMAT:
                return None
            splits = {name: mapped(folder / name) for name in meta["splits"]}
            facts = {name: Facts.of_report(split["facts"]) for name, split in meta["splits"].items()}
            damaged = [
                name for name, samples in splits.items() if samples.digest() != meta["splits"][name]["digest"]
            ]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            damaged = [META]
        if damaged:
            log.warning("%s is damaged (%s), and is made anew", folder, ", ".join(damaged))
            return None
        return LoadedData(
            splits["training"],
            splits.get("evaluation"),
            meta["sha256"],
            facts["training"],
            facts.get("evaluation"),
            tokenization().template if meta["template"] else None,
            use,
        )

    def write(self, key: str, size: int, make: Callable[[Path], LoadedData]) -> bool:
        """Fill the cache; False when that cannot be done here, which is logged.

        Args:
            key: by cache_key.
            size: bytes of the data.
            make: tokenizes into a folder.

        Raises what `make` raises, after which nothing of it is left.
        """
        uid, attempt, pod = self._writer
        new = self.folder / f".{key}.{uid}.{attempt}.{pod}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear_up()
            shutil.rmtree(self.folder / key, ignore_errors=True)  # it was found to be damaged
            self._make_room(size)
            free = shutil.disk_usage(self.folder).free
            why = (
                f"{format_bytes(free)} free, {format_bytes(ROOM * size)} needed" if free < ROOM * size else ""
            )
            if not why:
                new.mkdir()
                self._publish(new, self.folder / key, make(new))
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            why = error.strerror or str(error)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        if why:
            log.warning(
                "%s cannot keep tokens (%s): each rank makes its own, and keeps them in memory",
                self.folder,
                why,
            )
        return not why

    def _publish(self, new: Path, final: Path, data: LoadedData) -> None:
        splits = {"training": (data.train, data.train_facts)}
        if data.evaluation is not None and data.evaluation_facts is not None:
            splits["evaluation"] = (data.evaluation, data.evaluation_facts)
        for name in splits:
            for array in ARRAYS:
                files.sync_file(new / name / array)
        meta = {
            "format": FORMAT,
            "sha256": data.sha256,
            "template": data.template is not None,
            "splits": {
                name: {"facts": facts.report(), "digest": samples.digest()}
                for name, (samples, facts) in splits.items()
            },
        }
        files.write_atomically(new / META, json.dumps(meta, indent=1))
        try:
            new.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another pod was faster
                raise
        files.sync_folder(self.folder)

    def _clear_up(self) -> None:
        """Remove what writers that were killed have left."""
        uid, attempt, pod = self._writer
        now = time.time()
        for path in self.folder.glob(".*.tmp"):
            parts = path.name.removesuffix(".tmp").split(".")
            mine = parts[2:3] == [uid] and (int(parts[3]) < attempt or parts[3:] == [str(attempt), str(pod)])
            newest = max((file.stat().st_mtime for file in [path, *path.rglob("*")]), default=0)
            if mine or now - newest > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        """Remove what was not used for long, the oldest first, as long as there is too little room for these data."""
        entries = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                if not path.name.startswith("."):
                    entries.append(((path / META).stat().st_mtime, _size(path), path))
        total = sum(bytes_ for _, bytes_, _ in entries)
        uid, attempt, pod = self._writer
        for last_use, bytes_, path in sorted(entries, key=lambda entry: entry[0]):
            disk = shutil.disk_usage(self.folder)
            fits = total + TOKEN_SHARE * size <= MAX_SHARE * disk.total
            if (fits and disk.free >= ROOM * size) or time.time() - last_use < UNUSED_SECONDS:
                return
            with _unused(path / META) as unused:
                if not unused:
                    continue
                gone = self.folder / f".{path.name}.{uid}.{attempt}.{pod}.tmp"
                path.rename(gone)  # at once, so that nobody finds a half of it
            shutil.rmtree(gone, ignore_errors=True)
            total -= bytes_
            log.info("%s was not used for %d days and is removed, for room", path, UNUSED_SECONDS // 86_400)


class _Use:
    """Holds a shared lock on an entry until it is no more referred to."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def of(cls, meta: Path) -> "_Use | None":
        """Lock an entry, and note that it is used; None where there is none, or it cannot be locked."""
        try:
            use = cls(os.open(meta, os.O_RDONLY))
        except OSError:
            return None
        with suppress(OSError):
            fcntl.flock(use._descriptor, fcntl.LOCK_SH)
        with suppress(OSError):  # a workspace that can only be read
            os.utime(meta)
        return use

    def __del__(self) -> None:
        os.close(self._descriptor)


@contextmanager
def _unused(meta: Path) -> Iterator[bool]:
    """Whether nobody uses an entry; meanwhile nobody begins to."""
    with meta.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A volume without locks: what is used has a newer time.
            yield error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        else:
            yield True


def _size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def cache_key(
    dataset: Dataset,
    names: Sequence[Sequence[Sequence[str]]],
    sha256: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    options: TokenizationOptions,
) -> str:
    """A hash of all that decides about a dataset's tokens.

    Args:
        dataset: the job's.
        names: of each source's files to train on, and of those to evaluate on.
        sha256: of each source's files.
        tokenizer: the model's.
        max_length: tokens of a sample, at most.
        options: how records become tokens besides.
    """
    own = json.dumps(tokenizer.chat_template, sort_keys=True)
    template = options.template
    where = {"source", "revision", "credentials_secret"}
    parts = {
        "code": code_digest(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "dataset": dataset.model_dump(
            mode="json", exclude={*where, "sources", "chat_template", "chat_template_kwargs"}
        ),
        "sources": [each.model_dump(mode="json", exclude={*where, "weight"}) for each in dataset.all_sources],
        "several": dataset.sources is not None,
        "files": names,
        "sha256": sha256,
        "max_length": max_length,
        "train": options.train,
        "overlong": options.overlong,
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "core": tokenizer.backend_tokenizer.to_str(),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        },
        "template": template.source or own,
        "variables": dict(template.variables),
        "stops": template.stop_ids,
        "clock": shown_time(template.source or own, template.clock),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def shown_time(template: str, clock: Any) -> list[str]:
    """What a template is told of the time: what it asks for, or all, where that cannot be seen."""
    calls = re.findall(r"strftime_now\s*\(", template)
    formats = re.findall(r"""strftime_now\s*\(\s*\\?["']([^"'\\]*)\\?["']\s*\)""", template)
    if len(calls) > len(formats):
        return [clock.isoformat()]
    return [clock.strftime(each) for each in formats]


@cache
def code_digest() -> str:
    """sha256 of the code of this room."""
    hashed = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()
