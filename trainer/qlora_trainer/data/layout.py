"""Which files of a folder hold a split: one file, the numbered parts of one, or a folder. Pure.

The layouts are those of repositories of the Hub and of what the datasets library saves to disk.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from qlora_contract.containers import CONTAINERS, split_name
from qlora_trainer.errors import DataError

PLACES = ("", "data/", "default/")
"""Folders in which splits are looked for, in this order."""
PART = re.compile(r"(?P<split>.+?)[-_.](?P<number>\d{1,6})(?:[-_]of[-_](?P<of>\d{1,6}))?(?:-[0-9a-f]{8,64})?")
"""A file that holds a part of a split, such as `train-00000-of-00004`; the Hub may add a hash."""
MAX_SHOWN = 20


def split_files(names: Collection[str], split: str, folder: str, readme: str = "") -> list[str]:
    """The files of a split, in their order.

    Args:
        names: files of the folder, as paths relative to it with slashes.
        split: the split's name.
        folder: what to call the folder in errors.
        readme: text of its README.md; the `configs` of a dataset card say which files a split has.

    Raises DataError, which names the splits that there are.
    """
    data = sorted((name for name in names if split_name(name)), key=_natural)
    for candidates in (
        [name for name in data if _stem(name) == split],
        files_of_card(data, split, folder, readme),
        *([name for name in data if _in_place(name, split, place)] for place in PLACES),
        [name for name in data if "state.json" in names and split == "train" and "/" not in name],
    ):
        if candidates:
            _check(candidates, split, folder)
            return candidates
    known = sorted({_split_of(name) for name in data})
    shown = ", ".join(known[:MAX_SHOWN]) + (
        f" and {len(known) - MAX_SHOWN} more" if len(known) > MAX_SHOWN else ""
    )
    others = sorted(
        {PurePosixPath(name).suffix for name in names if not split_name(name)} - {"", ".md", ".json"}
    )
    unread = f"; files ending in {', '.join(others[:MAX_SHOWN])} are not read" if others and not known else ""
    choose = "; name one of them as dataset.trainSplit or evalSplit, or give its file" if known else ""
    raise DataError(
        f"{folder}: has no split {split!r} ({split} with one of {', '.join(CONTAINERS)}); its splits: "
        f"{shown or 'none'}{choose}{unread}"
    )


def _stem(name: str) -> str:
    parts = split_name(name)
    return parts[0] if parts else name


def _natural(name: str) -> list[Any]:
    """Sorts part 10 after part 9."""
    return [int(text) if text.isdigit() else text for text in re.split(r"(\d+)", name)]


def _in_place(name: str, split: str, place: str) -> bool:
    """Whether a file is a split's, or a part of it, directly in this folder or in the split's own folder below it."""
    stem = PurePosixPath(_stem(name))
    if f"{stem.parent}/" == f"{place}{split}/":
        return True
    part = PART.fullmatch(stem.name)
    same_place = str(stem.parent) == (place.rstrip("/") or ".")
    return same_place and (stem.name == split or (part is not None and part["split"] == split))


def _split_of(name: str) -> str:
    """The split that a file seems to belong to."""
    stem = PurePosixPath(_stem(name))
    part = PART.fullmatch(stem.name)
    if part is not None:
        return part["split"]
    within = stem.parent.name
    return within if stem.name.isdigit() or (within and f"{within}/" not in PLACES) else stem.name


def _check(files: Sequence[str], split: str, folder: str) -> None:
    """Raises DataError when the files are not one split, whole."""
    kinds = {name.removeprefix(_stem(name)) for name in files}
    if len(kinds) > 1:
        raise DataError(
            f"{folder}: has split {split!r} more than once ({' and '.join(files[:MAX_SHOWN])}); leave one of them"
        )
    parts = [
        part for name in files if (part := PART.fullmatch(PurePosixPath(_stem(name)).name)) and part["of"]
    ]
    for count in {int(part["of"]) for part in parts}:
        there = len({int(part["number"]) for part in parts if int(part["of"]) == count})
        if there < count:
            raise DataError(
                f"{folder}: has {there} of the {count} files of split {split!r}; copy the others as well"
            )


def files_of_card(data: Sequence[str], split: str, folder: str, readme: str) -> list[str]:
    """The files that a dataset card names for a split; none where it names none, or not in a way that is known.

    Raises DataError when the card has several configurations, none of which is the default.
    """
    configs = _configs(readme)
    if not configs:
        return []
    default = [c for c in configs if c.get("default") is True or c.get("config_name") == "default"] or configs
    if len(default) > 1:
        names = ", ".join(str(config.get("config_name")) for config in configs[:MAX_SHOWN])
        raise DataError(
            f"{folder}: its README.md has the configurations {names} and no default one; give the folder or the "
            "file of one of them as the source"
        )
    listed = default[0].get("data_files")
    entries = listed if isinstance(listed, list) else [listed]
    if split == "train" and all(isinstance(entry, str) for entry in entries):
        patterns: list[Any] = entries
    else:
        found = [e.get("path") for e in entries if isinstance(e, dict) and str(e.get("split")) == split]
        patterns = [pattern for path in found for pattern in (path if isinstance(path, list) else [path])]
    wanted = [_glob(pattern) for pattern in patterns if isinstance(pattern, str)]
    return [name for name in data if any(pattern.fullmatch(name) for pattern in wanted)]


def _configs(readme: str) -> list[dict[str, Any]]:
    """`configs` of the card at the beginning of a README.md."""
    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    try:
        card = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    configs = card.get("configs") if isinstance(card, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _glob(pattern: str) -> re.Pattern[str]:
    """A card's pattern: `*` and `?` within a name, `**` across folders."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    return re.compile("".join(pieces.get(token, re.escape(token)) for token in tokens))
