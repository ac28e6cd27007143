"""The token cache of a workspace: what was tokenized once is mapped by all ranks of a pod, and by later jobs.

    cache/tokens/<key>/meta.json            what is there
    cache/tokens/<key>/training/...         arrays, as samples.SampleWriter writes them
    cache/tokens/<key>/evaluation/...

The key is a hash of everything that decides about tokens, the trainer's own code among it, so nothing in the cache is
ever wrong. What was damaged is told by the digests of the tokens, and made anew. storage/cache.py has the rest.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_contract.files import read_json
from qlora_contract.run_config import Dataset
from qlora_trainer.data.dataset import Facts, LoadedData
from qlora_trainer.data.samples import mapped
from qlora_trainer.data.tokenization import Tokenization, TokenizationOptions
from qlora_trainer.storage import cache
from qlora_trainer.storage.cache import META, Cache, Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "cache/tokens"
"""In a workspace."""
FORMAT = 1
"""Of META and of what stands beside it."""
ROOM = 2
"""Bytes that must be free for each of the data: tokens take 1.25 times a text's, and checkpoints come after them."""
TOKEN_SHARE = 1.25
"""Bytes of tokens for each of the data."""
LIBRARIES = ("jinja2", "numpy", "pyarrow", "tokenizers", "transformers")


class TokenCache:
    """The cache of a workspace, as one process of a job uses it."""

    def __init__(self, workspace: Path, writer: Writer) -> None:
        self.folder = workspace / FOLDER
        otherwise = "each rank makes its own, and keeps them in memory"
        self._cache = Cache(self.folder, writer, "tokens", otherwise)

    def read(self, key: str, tokenization: Callable[[], Tokenization]) -> LoadedData | None:
        """What the cache has under a key; None when it has nothing that is whole.

        Args:
            key: by cache_key.
            tokenization: makes what the template is taken from, where one was used.
        """
        folder = self.folder / key
        use = self._cache.use(key)
        try:
            meta = read_json(folder / META)
            if meta["format"] != FORMAT:
                return None
            splits = {name: mapped(folder / name) for name in meta["splits"]}
            facts = {name: Facts.of_report(split["facts"]) for name, split in meta["splits"].items()}
            damaged = [
                name for name, samples in splits.items() if samples.digest() != meta["splits"][name]["digest"]
            ]
        except FileNotFoundError as error:
            if use is None:
                return None
            damaged = [str(error.filename)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            damaged = [META]
        if damaged:
            self._cache.discard(key, use, ", ".join(damaged))
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
        return self._cache.make_room(int(TOKEN_SHARE * size), ROOM * size) and self._cache.write(
            lambda folder: (key, _meta(make(folder)))
        )


def _meta(data: LoadedData) -> dict[str, Any]:
    splits = {"training": (data.train, data.train_facts)}
    if data.evaluation is not None and data.evaluation_facts is not None:
        splits["evaluation"] = (data.evaluation, data.evaluation_facts)
    return {
        "format": FORMAT,
        "sha256": data.sha256,
        "template": data.template is not None,
        "splits": {
            name: {"facts": facts.report(), "digest": samples.digest()}
            for name, (samples, facts) in splits.items()
        },
    }


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


def code_digest() -> str:
    """sha256 of the code of this room."""
    return cache.code_digest(Path(__file__).parent)
