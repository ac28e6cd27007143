"""Files as people bring them from elsewhere: each trains, with exactly its answers learned, or a sentence says what to
do. In the order in which a new user tried them."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qlora_contract.run_config import Dataset
from qlora_trainer.data.dataset import load
from qlora_trainer.data.tokenization import render
from qlora_trainer.errors import DataError, TrainerError

pytestmark = pytest.mark.process

ASKED, SAID = "What is it?", "It is so."
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
SHAREGPT = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]
ALPACA = {"instruction": ASKED, "input": "", "output": SAID}
END = "<|im_end|>"
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "id": "c1", "function": {"name": "find", "arguments": '{"word": "it"}'}}
TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "f", "parameters": {"type": "object"}},
}

Write = Callable[[Path], None]


def lines(*records: Any, start: str = "", end: str = "\n") -> bytes:
    """JSONL."""
    return (start + "".join(json.dumps(record) + end for record in records)).encode()


def parquet(*records: dict[str, Any]) -> bytes:
    """A Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet as writer

    out = io.BytesIO()
    writer.write_table(pa.Table.from_pylist(list(records)), out)
    return out.getvalue()


def arrow(*records: dict[str, Any]) -> bytes:
    """A stream as `Dataset.save_to_disk` writes it."""
    import pyarrow as pa

    table = pa.Table.from_pylist(list(records))
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    return out.getvalue()


class Brought(NamedTuple):
    """Files, and what is learned of them."""

    files: dict[str, bytes]
    learned: list[str]
    fields: dict[str, Any] = {}  # noqa: RUF012
    """Of the dataset."""
    template: str | None = None
    """The model's, if not ChatML."""


CHAT = {"messages": TURNS}
ONE = [SAID + END]
WHOLE = [SAID[1:] + END]
"""Of a document; with this tokenizer, which begins with nothing, its first token is predicted from nothing."""
TAKEN: dict[str, Brought] = {
    "messages": Brought({"d.jsonl": lines(CHAT)}, ONE),
    "messages with a system and several turns": Brought(
        {"d.jsonl": lines({"messages": [{"role": "system", "content": "Be brief."}, *TURNS, *TURNS]})},
        [SAID + END + SAID + END],
    ),
    "messages that end with the user": Brought({"d.jsonl": lines({"messages": [*TURNS, TURNS[0]]})}, ONE),
    "messages with other keys": Brought({"d.jsonl": lines({**CHAT, "id": 7, "source": "web"})}, ONE),
    "a byte order mark": Brought({"d.jsonl": lines(CHAT, start="\ufeff")}, ONE),
    "CRLF": Brought({"d.jsonl": lines(CHAT, CHAT, end="\r\n")}, ONE * 2),
    "blank lines": Brought({"d.jsonl": lines(CHAT, end="\n\n\n")}, ONE),
    "prompt and completion": Brought({"d.jsonl": lines({"prompt": "Q: ", "completion": "A"})}, ["A" + END]),
    "a turn of weight 0": Brought(
        {"d.jsonl": lines({"messages": [TURNS[0], {**TURNS[1], "content": "WRONG", "weight": 0}, *TURNS]})},
        ONE,
    ),
    "reasoning, with a template that writes it": Brought(
        {"d.jsonl": lines({"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "Hm."}]})},
        ["(Hm.)" + SAID + END],
        template=TOOL_TEMPLATE,
    ),
    "tools and calls, with a template that writes them": Brought(
        {
            "d.jsonl": lines(
                {
                    "messages": [
                        TURNS[0],
                        {"role": "assistant", "content": None, "tool_calls": [CALL]},
                        {"role": "tool", "content": "Here.", "tool_call_id": "c1", "name": "find"},
                        TURNS[1],
                    ],
                    "tools": [TOOL],
                }
            )
        },
        ['[find {"word": "it"}]' + END + SAID + END],
        template=TOOL_TEMPLATE,
    ),
    "content in parts": Brought(
        {
            "d.jsonl": lines(
                {"messages": [TURNS[0], {**TURNS[1], "content": [{"type": "text", "text": SAID}]}]}
            )
        },
        ONE,
    ),
    "the role developer": Brought(
        {"d.jsonl": lines({"messages": [{"role": "developer", "content": "Be brief."}, *TURNS]})}, ONE
    ),
    "prompt and completion as messages": Brought(
        {"d.jsonl": lines({"prompt": TURNS[:1], "completion": TURNS[1:]})}, ONE
    ),
    "Alpaca": Brought({"d.jsonl": lines(ALPACA)}, ONE),
    "Alpaca as an indented array": Brought({"d.json": json.dumps([ALPACA], indent=2).encode()}, ONE),
    "Alpaca as an array on a line": Brought({"d.json": json.dumps([ALPACA]).encode()}, ONE),
    "an array that is called JSONL": Brought({"d.jsonl": json.dumps([ALPACA], indent=2).encode()}, ONE),
    "ShareGPT": Brought({"d.json": json.dumps([{"conversations": SHAREGPT}]).encode()}, ONE),
    "conversations with role and content": Brought({"d.jsonl": lines({"conversations": TURNS})}, ONE),
    "messages with from and value": Brought({"d.jsonl": lines({"messages": SHAREGPT})}, ONE),
    "a folder with train.json": Brought({"f/train.json": json.dumps([ALPACA]).encode()}, ONE),
    "a folder with train.csv": Brought({"f/train.csv": b"instruction,output\nWhat?,It is so.\n"}, ONE),
    "a folder with train.txt": Brought({"f/train.txt": b"It is so.\n"}, WHOLE),
    "a folder with parts of Parquet": Brought(
        {
            "f/README.md": b"# Data\n",
            **{f"f/data/train-0000{n}-of-00002.parquet": parquet(CHAT) for n in range(2)},
        },
        ONE * 2,
    ),
    "a folder of save_to_disk": Brought(
        {
            "f/data-00000-of-00001.arrow": arrow(CHAT),
            "f/dataset_info.json": b"{}",
            "f/state.json": b'{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}',
        },
        ONE,
    ),
    "question and answer, with columns": Brought(
        {"d.jsonl": lines({"question": ASKED, "answer": SAID})},
        ONE,
        {"columns": {"instruction": "question", "output": "answer"}},
    ),
    "texts": Brought({"d.jsonl": lines({"text": SAID})}, WHOLE),
    "a book": Brought({"book.txt": b"It is so.\n\nIt is so.\n"}, WHOLE * 2),
    "questions in CSV, with columns": Brought(
        {"qa.csv": b"question,answer\nWhat?,It is so.\n"},
        ONE,
        {"columns": {"instruction": "question", "output": "answer"}},
    ),
    "Parquet": Brought({"msgs.parquet": parquet(CHAT)}, ONE),
    "compressed": Brought({"msgs.jsonl.gz": gzip.compress(lines(CHAT))}, ONE),
}


def _written(folder: Path, files: dict[str, bytes]) -> Path:
    """The source of a job with these files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    first = next(iter(files))
    return folder / first.partition("/")[0]


@pytest.mark.parametrize("brought", TAKEN.values(), ids=TAKEN)
def test_it_trains_on_its_answers_alone(
    tmp_path: Path, byte_tokenizer: Callable[..., Any], brought: Brought
) -> None:
    """Nothing of a question is learned, and each answer with what ends it."""
    tokenizer = byte_tokenizer(brought.template) if brought.template else byte_tokenizer()
    dataset = Dataset.model_validate({"source": "pvc://c/d", "eval_fraction": 0.0, **brought.fields})

    loaded = load(dataset, _written(tmp_path, brought.files), tokenizer, 1000).train

    assert [
        "".join(text for text, learned in render(*loaded.sample(number), tokenizer) if learned)
        for number in range(len(loaded))
    ] == brought.learned


DPO = {"prompt": ASKED, "chosen": SAID, "rejected": "No."}
REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "tools, with a template that drops them": (
        {"d.jsonl": lines({**CHAT, "tools": [TOOL]})},
        r"d\.jsonl: line 1: the record has tools, .* template",
    ),
    "reasoning, with a template that drops it": (
        {"d.jsonl": lines({"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "Hm."}]})},
        r"d\.jsonl: line 1: messages\[1\].*reasoning_content",
    ),
    "question and answer": (
        {"d.jsonl": lines({"question": ASKED, "answer": SAID})},
        r"did you mean dataset\.columns: \{instruction: question, output: answer\} ",
    ),
    "prompt and response": (
        {"d.jsonl": lines({"prompt": ASKED, "response": SAID})},
        r"did you mean dataset\.columns: \{instruction: prompt, output: response\} ",
    ),
    "questions in CSV": (
        {"qa.csv": b"question,answer\nWhat?,It is so.\n"},
        r"qa\.csv: row 2: fits no format .*did you mean dataset\.columns",
    ),
    "preferences": (
        {"d.jsonl": lines(DPO)},
        r"preference data, .*there is no preference training \(DPO and the like\); give the wanted answers alone",
    ),
    "preferences as messages": (
        {"d.jsonl": lines({"chosen": TURNS, "rejected": TURNS})},
        r"it is preference data, which is not trained on: there is no preference training",
    ),
    "preferences beside messages": (
        {"d.jsonl": lines({**CHAT, "rejected": "No."})},
        r"has the key rejected, which makes it preference data, .*there is no preference training",
    ),
    "wanted and unwanted completions": (
        {"d.jsonl": lines({"prompt": ASKED, "completion": SAID, "label": False})},
        r"wanted and unwanted completions .*keep the wanted ones",
    ),
    "compressed, but not called so": (
        {"msgs.jsonl": gzip.compress(lines(CHAT))},
        r"msgs\.jsonl: is compressed with gzip; let its name end in \.gz",
    ),
    "Parquet, but called JSONL": (
        {"msgs.jsonl": parquet(CHAT)},
        r"msgs\.jsonl: is a Parquet file; let its name end in \.parquet",
    ),
    "UTF-16": (
        {"d.jsonl": json.dumps(CHAT).encode("utf-16")},
        r"d\.jsonl: line 1: byte 1 is not UTF-8, but UTF-16; save the file as UTF-8",
    ),
    "Latin-1": (
        {"d.jsonl": lines(CHAT) + '{"messages": "\xe9"}\n'.encode("latin-1")},
        r"d\.jsonl: line 2: byte 15 is not UTF-8; save the file as UTF-8",
    ),
    "a broken line": (
        {"d.jsonl": lines(CHAT, CHAT) + b'{"messages": [}\n'},
        r"d\.jsonl: line 3: is not JSON \(Expecting value at column 15\)",
    ),
    "an empty answer": (
        {"d.jsonl": lines({"prompt": ASKED, "completion": ""})},
        r"d\.jsonl: line 1: completion is blank, so there is nothing to learn",
    ),
    "mixed formats": (
        {"d.jsonl": lines(CHAT, ALPACA)},
        r"d\.jsonl: line 2: has no key 'messages'; as the first record is in the chat format, it must be",
    ),
    "a folder with nothing that is read": (
        {"f/data.pdf": b"%PDF-1.7"},
        r"has no split 'train' .*its splits: none; files ending in \.pdf are not read",
    ),
    "a folder without train": (
        {"f/notes.jsonl": lines(CHAT)},
        r"has no split 'train' .*its splits: notes",
    ),
    "images": (
        {"d.jsonl": lines({**CHAT, "images": ["a.png"]})},
        r"has the key images, which cannot be trained on",
    ),
}


@pytest.mark.parametrize(("files", "sentence"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_in_a_sentence_that_says_what_to_do(
    tmp_path: Path, byte_tokenizer: Callable[..., Any], files: dict[str, bytes], sentence: str
) -> None:
    """With the file, the place in it, and what would be right."""
    dataset = Dataset(source="pvc://c/d", eval_fraction=0.0)

    with pytest.raises(TrainerError, match=sentence):
        load(dataset, _written(tmp_path, files), byte_tokenizer(), 1000)


def test_thirty_records_need_no_other_settings(tmp_path: Path, byte_tokenizer: Callable[..., Any]) -> None:
    """At least one is held out."""
    records = [{"instruction": f"{n}?", "output": SAID} for n in range(30)]
    loaded = load(
        Dataset(source="pvc://c/d"), _written(tmp_path, {"d.jsonl": lines(*records)}), byte_tokenizer(), 1000
    )

    assert loaded.evaluation is not None
    assert len(loaded.train) + len(loaded.evaluation) == 30


def test_what_is_cut_and_left_out_is_told(tmp_path: Path, byte_tokenizer: Callable[..., Any]) -> None:
    """In one line, which the log and the report have as well."""
    records = [{"prompt": "p" * n, "completion": "c" * 10} for n in (1, 15, 40)]
    loaded = load(
        Dataset(source="pvc://c/d", eval_fraction=0.0),
        _written(tmp_path, {"d.jsonl": lines(*records)}),
        byte_tokenizer(),
        20,
    )

    assert "2 truncated to maxSequenceLength, 1 of them dropped" in loaded.train_facts.summary()


def test_a_refusal_is_of_the_data(tmp_path: Path, byte_tokenizer: Callable[..., Any]) -> None:
    """So a job ends with the exit code for data."""
    with pytest.raises(DataError):
        load(
            Dataset(source="pvc://c/d", eval_fraction=0.0),
            _written(tmp_path, {"d.jsonl": lines(DPO)}),
            byte_tokenizer(),
            1000,
        )
