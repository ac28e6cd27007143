"""Containers x formats x families: the table of docs/data.md, each cell."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import data_cells
from data_cells import CHATS, CONTAINERS, FORMATS, cell
from families import FAMILIES, Family, tokenizer_of
from qlora_contract.run_config import Dataset
from qlora_trainer.data.chat_template import TemplateSettings
from qlora_trainer.data.dataset import load
from qlora_trainer.data.family_templates import TEMPLATES
from qlora_trainer.data.records import Chat, Document, PromptCompletion, Record
from qlora_trainer.data.sources import find_files, read_split
from qlora_trainer.data.tokenization import Tokenization, TokenizationOptions, render
from qlora_trainer.errors import DataError

pytestmark = pytest.mark.process

DATASET = Dataset(source="pvc://c/d", eval_fraction=0.0)
CELLS = [(container, form) for container in CONTAINERS for form in FORMATS]


@pytest.fixture(scope="module")
def digests(byte_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tokens of each format's records, from JSONL."""
    return {
        form: load(
            DATASET, data_cells.write(tmp_path_factory.mktemp("d"), "JSONL", form), byte_tokenizer(), 1000
        ).train.digest()
        for form in FORMATS
    }


@pytest.mark.parametrize(("container", "form"), CELLS)
def test_the_same_rows_in_any_container_are_the_same_tokens(
    container: str, form: str, tmp_path: Path, byte_tokenizer: Callable[..., Any], digests: dict[str, str]
) -> None:
    """In a container that can hold them; the format is found without being told."""
    if not cell(container, form):
        with pytest.raises(KeyError):
            data_cells.write(tmp_path, container, form)
        return
    loaded = load(DATASET, data_cells.write(tmp_path, container, form), byte_tokenizer(), 1000)

    assert loaded.train_facts.format == FORMATS[form][0]
    assert loaded.train.digest() == digests[form]


def test_the_formats_of_conversations_say_the_same(digests: dict[str, str]) -> None:
    """A question and its answer are the same, whoever wrote them down."""
    assert len({digests[form] for form in CHATS if form != "prompt and completion as messages"}) == 1
    assert digests["prompt and completion as messages"] == digests["messages"]


@cache
def _records(form: str) -> tuple[Record, ...]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (source,) = DATASET.all_sources
        files, _ = find_files(source, data_cells.write(Path(folder), "JSONL", form))
        rows, _, interpretation = read_split(source, files)
        return tuple(record for record in interpretation(rows) if isinstance(record, Record))


@cache
def _tokenizer(family: str) -> Any:
    return tokenizer_of(next(other for other in FAMILIES if other.name == family))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_learns_the_answers_of_every_format(family: Family, form: str) -> None:
    """Exactly the answers and their ends; or, of a template that cannot be trained with, the sentence that says so."""
    tokenizer = _tokenizer(family.name)
    stops = tuple(tokenizer.convert_tokens_to_ids(list(family.stops)))
    settings = TemplateSettings(family.template, stop_ids=stops)
    tokenization = Tokenization(tokenizer, 10_000, TokenizationOptions(settings))
    record = _records(form)[0]
    refused = family.refuses.get("*") or family.refuses.get("single")
    if isinstance(record.content, Chat) and refused:
        with pytest.raises(DataError, match=refused):
            list(tokenization.samples([record]))
        return
    [sample] = tokenization.samples([record])
    learned = "".join(text for text, marked in render(sample.ids, sample.mask, tokenizer) if marked)

    match record.content:
        case Chat():
            assert learned == family.learned(record.content)
        case PromptCompletion(_, completion):
            assert learned == completion + family.eos
        case Document(text):
            assert learned.endswith(text[1:] + family.eos)  # the first token may be predicted from nothing


def test_every_bundled_template_is_among_the_families() -> None:
    """So that the page may say that it is tested with each of them."""
    assert {*TEMPLATES} <= {family.name for family in FAMILIES}
