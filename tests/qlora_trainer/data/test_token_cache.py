"""The token cache of a workspace."""

import datetime
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from qlora_contract.run_config import Dataset
from qlora_trainer.data import token_cache
from qlora_trainer.data.chat_template import TemplateSettings
from qlora_trainer.data.dataset import LoadedData, load
from qlora_trainer.data.token_cache import TokenCache, cache_key, shown_time
from qlora_trainer.data.tokenization import Tokenization, TokenizationOptions
from qlora_trainer.errors import DataError

pytestmark = pytest.mark.process

DATASET = Dataset(source="pvc://claim/data", on_bad_record="skip", max_bad_share=0.5, eval_fraction=0.2)
CLOCK = datetime.datetime(2026, 1, 31, 23, 59, tzinfo=datetime.UTC)


class Kept(NamedTuple):
    """A cache, what is in it, and how it got there."""

    cache: TokenCache
    data: LoadedData
    tokenization: Callable[[], Tokenization]
    make: Callable[[Path], LoadedData]


@pytest.fixture
def kept(tmp_path: Path, byte_tokenizer: Callable[..., Any]) -> Kept:
    """A cache with the tokens of some conversations under the key `k`."""
    tokenizer = byte_tokenizer()
    turns = [
        [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "b" * (n % 40 + 1)}]
        for n in range(99)
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(["nonsense", *(json.dumps({"messages": messages}) for messages in turns)]))
    cache = TokenCache(tmp_path / "work", ("uid", 1, 0))
    make = partial(_make, path, tokenizer)
    assert cache.write("k", 1, make)
    return Kept(cache, load(DATASET, path, tokenizer, 32), partial(Tokenization, tokenizer, 32), make)


def _make(path: Path, tokenizer: Any, folder: Path) -> LoadedData:
    return load(DATASET, path, tokenizer, 32, folder=folder)


def test_what_was_written_is_read_again(kept: Kept) -> None:
    """Tokens, facts, digests and template: as if it had been tokenized anew."""
    found = kept.cache.read("k", kept.tokenization)

    assert found is not None
    assert found.train.digest() == kept.data.train.digest()
    assert found.evaluation is not None
    assert kept.data.evaluation is not None
    assert found.evaluation.digest() == kept.data.evaluation.digest()
    assert (found.facts(), found.sha256) == (kept.data.facts(), kept.data.sha256)
    assert found.template is not None
    assert kept.data.template is not None
    assert found.template.digest() == kept.data.template.digest()
    assert found.train.supervised_counts().tolist() == kept.data.train.supervised_counts().tolist()
    assert kept.cache.read("other", kept.tokenization) is None


@pytest.mark.parametrize(
    "file", ["training/ids", "training/mask", "evaluation/offsets", "evaluation/ids", "meta.json"]
)
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_what_is_damaged_is_noticed_and_made_anew(
    kept: Kept, caplog: pytest.LogCaptureFixture, file: str, how: str
) -> None:
    """A bit, a tail or a file: nothing wrong is ever read."""
    path = kept.cache.folder / "k" / file
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: -len(content) // 2] if how == "cut" else content)

    found = kept.cache.read("k", kept.tokenization)

    if (
        file == "meta.json" and how == "flipped" and found is not None
    ):  # a letter of a sentence in it, at most
        assert found.train.digest() == kept.data.train.digest()
        return
    assert found is None
    assert kept.cache.write("k", 1, kept.make)
    again = kept.cache.read("k", kept.tokenization)
    assert again is not None
    assert again.train.digest() == kept.data.train.digest()


def test_an_error_in_the_middle_leaves_nothing(kept: Kept) -> None:
    """The next attempt begins anew."""

    def fail(folder: Path) -> LoadedData:
        (folder / "half").touch()
        raise DataError("no")

    with pytest.raises(DataError):
        kept.cache.write("other", 1, fail)
    assert [path.name for path in kept.cache.folder.iterdir()] == ["k"]


def test_what_a_killed_attempt_left_is_removed(kept: Kept) -> None:
    """Not what another pod, or another job, may be writing; unless that was long ago."""
    folder = kept.cache.folder
    names = {
        ".a.uid.0.3.tmp": False,  # an attempt before
        ".b.uid.1.0.tmp": False,  # this very pod, before
        ".c.uid.1.1.tmp": True,  # another pod of this attempt
        ".d.other.0.0.tmp": True,
        ".e.ancient.0.0.tmp": False,
    }
    for name in names:
        (folder / name / "training").mkdir(parents=True)
    for path in (folder / ".e.ancient.0.0.tmp" / "training", folder / ".e.ancient.0.0.tmp"):
        os.utime(path, (0, 0))

    kept.cache.write("new", 1, kept.make)

    assert {name: (folder / name).exists() for name in names} == names


def test_another_pod_may_be_faster(kept: Kept) -> None:
    """What it has made is the same."""

    def make(folder: Path) -> LoadedData:
        shutil.copytree(kept.cache.folder / "k", kept.cache.folder / "new")
        return kept.make(folder)

    assert kept.cache.write("new", 1, make)
    assert kept.cache.read("new", kept.tokenization) is not None
    assert sorted(path.name for path in kept.cache.folder.iterdir()) == ["k", "new"]


def test_without_room_nothing_is_written_and_that_is_said_once(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The job goes on without a cache, and its checkpoints have the room that is left."""
    size = shutil.disk_usage(kept.cache.folder).free

    with caplog.at_level(logging.WARNING):
        assert not kept.cache.write("new", size, kept.make)
    [said] = caplog.messages
    assert "cannot keep tokens (" in said
    assert " free, " in said


def test_a_workspace_that_cannot_be_written_to_is_done_without(
    kept: Kept, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here a file stands where the cache's folder would be."""
    (tmp_path / "file").touch()
    cache = TokenCache(tmp_path / "file", ("uid", 0, 0))

    assert not cache.write("k", 1, kept.make)
    assert "cannot keep tokens (Not a directory)" in caplog.text
    assert cache.read("k", kept.tokenization) is None


def _key(tokenizer: Any, **changes: Any) -> str:
    names = [["a.jsonl"], []]
    known: dict[str, Any] = {"dataset": DATASET, "names": names, "sha256": "1", "max_length": 64}
    known["options"] = TokenizationOptions()
    fields = known | changes
    return cache_key(
        fields["dataset"],
        fields["names"],
        fields["sha256"],
        tokenizer,
        fields["max_length"],
        fields["options"],
    )


def _options(source: str | None = None, clock: datetime.datetime = CLOCK, **more: Any) -> TokenizationOptions:
    return TokenizationOptions(TemplateSettings(source, clock=clock, **more.pop("template", {})), **more)


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": DATASET.model_copy(update={"max_bad_share": 0.4})},
        {"dataset": DATASET.model_copy(update={"format": "chat"})},
        {"names": [["a.csv"], []]},
        {"sha256": "2"},
        {"max_length": 65},
        {"options": _options("{{ messages }}")},
        {"options": _options(train="lastTurn")},
        {"options": _options(overlong="drop")},
        {"options": _options(template={"variables": {"a": True}})},
        {"options": _options(template={"stop_ids": (7,)})},
    ],
    ids=lambda changes: next(iter(changes)),  # an object's text has its address, another in each process
)
def test_whatever_decides_about_tokens_is_in_the_key(
    byte_tokenizer: Callable[..., Any], changes: Any
) -> None:
    """Another key for each change."""
    tokenizer = byte_tokenizer()

    assert _key(tokenizer) == _key(tokenizer)
    assert _key(tokenizer, **changes) != _key(tokenizer)


def test_the_tokenizer_and_the_code_are_in_the_key(
    byte_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model's own template."""
    keys = {
        _key(byte_tokenizer()),
        _key(byte_tokenizer(merges=(("l", "l"),))),
        _key(byte_tokenizer("{{ messages }}")),
        _key(byte_tokenizer(bos=True)),
    }
    monkeypatch.setattr(token_cache, "code_digest", lambda: "other")

    assert len(keys | {_key(byte_tokenizer())}) == 5


def test_where_the_data_are_is_not_in_the_key(byte_tokenizer: Callable[..., Any]) -> None:
    """Nor when a job began, for a template that does not ask."""
    tokenizer = byte_tokenizer()
    moved = DATASET.model_copy(update={"source": "pvc://claim/elsewhere"})
    later = _options(clock=CLOCK + datetime.timedelta(days=1))

    assert _key(tokenizer, dataset=moved, options=later) == _key(tokenizer, options=_options())


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", []),
        ("{{ strftime_now('%d %b %Y') }}", ["31 Jan 2026"]),
        ('{% if strftime_now is defined %}{{ strftime_now("%Y") }}{% endif %}', ["2026"]),
        (json.dumps('{{ strftime_now("%Y") }}'), ["2026"]),
        ("{{ strftime_now(format) }}", ["2026-01-31T23:59:00+00:00"]),
    ],
)
def test_of_the_time_counts_what_a_template_is_told(template: str, expected: list[str]) -> None:
    """So that a job of the same day finds the tokens."""
    assert shown_time(template, CLOCK) == expected


# --- room


def _age(kept: Kept, key: str, days: float) -> None:
    """As if an entry had last been used so long ago."""
    then = time.time() - days * 86_400
    os.utime(kept.cache.folder / key / "meta.json", (then, then))


def _size(kept: Kept) -> int:
    """Bytes of an entry."""
    return sum(path.stat().st_size for path in (kept.cache.folder / "k").rglob("*") if path.is_file())


def _entries(kept: Kept) -> set[str]:
    return {path.name for path in kept.cache.folder.iterdir()}


@pytest.fixture
def full(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> Kept:
    """A cache with three entries in a workspace with room for a fourth, but not for what comes besides."""
    for key in ("l", "m"):
        assert kept.cache.write(key, 1, kept.make)
    one = _size(kept)

    def usage(_: Path) -> Any:
        used = one * len(list(kept.cache.folder.iterdir()))
        return SimpleNamespace(total=1000 * one, used=used, free=4 * one - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return kept


def test_what_was_not_used_for_long_makes_room_the_oldest_first(full: Kept) -> None:
    """No more of it than there is need for."""
    for key, days in (("k", 9), ("l", 30), ("m", 8)):
        _age(full, key, days)

    assert full.cache.write("new", _size(full), full.make)
    assert _entries(full) == {"k", "m", "new"}


def test_what_is_used_is_never_removed(full: Kept) -> None:
    """However old its last use is; once it is used no more, it may go."""
    found = full.cache.read("l", full.tokenization)
    assert found is not None
    for key, days in (("k", 9), ("l", 30), ("m", 1)):
        _age(full, key, days)

    size = _size(full)
    assert full.cache.write("new", size, full.make)
    assert _entries(full) == {"l", "m", "new"}
    del found
    assert full.cache.write("other", size, full.make)
    assert "l" not in _entries(full)


def test_what_was_used_lately_stays(full: Kept, caplog: pytest.LogCaptureFixture) -> None:
    """A job that is started again finds its tokens; the new one goes without a cache."""
    for key in ("k", "l", "m"):
        _age(full, key, 30)
        assert full.cache.read(key, full.tokenization) is not None

    assert not full.cache.write("new", _size(full), full.make)
    assert _entries(full) == {"k", "l", "m"}
    assert "cannot keep tokens" in caplog.text


def test_the_cache_is_bounded_where_there_is_room(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the file system is enough for tokens."""
    one = _size(kept)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=4 * one, used=one, free=10**12))
    _age(kept, "k", 8)

    assert kept.cache.write("new", 10, kept.make)
    assert _entries(kept) == {"new"}
