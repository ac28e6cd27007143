"""Tokenizers as llama.cpp knows them."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

from qlora_trainer.errors import ModelError
from qlora_trainer.export import vocabulary
from qlora_trainer.export.vocabulary import pre_tokenizer_name, read_vocabulary

pytestmark = pytest.mark.process

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def split(expression: str) -> dict[str, Any]:
    """A pre-tokenizer that splits by an expression."""
    first = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, BYTES]}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        pytest.param(WORDS, "gpt-2", id="GPT-2's words"),
        pytest.param(
            {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, WORDS]},
            "smollm",
            id="and digits",
        ),
        pytest.param(split(LLAMA3), "llama-bpe", id="Llama 3"),
        pytest.param(split(LLAMA3.replace("{1,3}", "")), "qwen2", id="Qwen 2"),
        pytest.param(split(PRETOKENIZE_REGEX), "qwen35", id="Qwen 3.5"),
    ],
)
def test_each_known_way_to_split_words_has_its_name(pre_tokenizer: dict[str, Any], name: str) -> None:
    """What decides is the expression itself."""
    assert pre_tokenizer_name(pre_tokenizer) == name


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pytest.param(None, id="none"),
        pytest.param(BYTES, id="bytes alone"),
        pytest.param(split(r"\p{L}+"), id="another expression"),
        pytest.param({**WORDS, "add_prefix_space": True}, id="a space before the first word"),
        pytest.param({"type": "Whitespace"}, id="no bytes"),
    ],
)
def test_an_unknown_way_to_split_words_is_refused(pre_tokenizer: dict[str, Any] | None) -> None:
    """A file with a wrong name would give other tokens, and nobody would see why answers are worse."""
    with pytest.raises(ModelError, match="no known name for"):
        pre_tokenizer_name(pre_tokenizer)


def test_tokens_have_types_and_the_rest_of_the_embedding_is_filled_up(smollm2_tokenizer: Any) -> None:
    """Marks of the template are control tokens; rows without a token are unused ones."""
    rows = len(smollm2_tokenizer) + 3

    found = read_vocabulary(smollm2_tokenizer, rows)

    assert (found.model, found.pre, len(found.tokens)) == ("gpt2", "gpt-2", rows)
    assert found.types[smollm2_tokenizer.convert_tokens_to_ids("<|im_end|>")] == vocabulary.CONTROL
    assert found.types[-1] == vocabulary.UNUSED
    assert found.tokens[-1] == f"[PAD{rows - 1}]"
    assert found.merges[0] == "Ġ t"
    assert not found.add_bos


def test_a_beginning_that_every_text_gets_is_told(byte_tokenizer: Callable[..., Any]) -> None:
    """Whatever tokenizer_config.json says of it: what counts is what the tokenizer does."""
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.backend_tokenizer.pre_tokenizer = _words()

    assert read_vocabulary(tokenizer, len(tokenizer)).add_bos


def _words() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def test_sentencepiece_gets_scores_in_the_order_of_its_merges() -> None:
    """llama.cpp merges the pair with the best score, tokenizers the first of the list."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab"]
    core = Tokenizer(
        models.BPE(
            vocab={word: number for number, word in enumerate(words)},
            merges=[("a", "b"), ("▁", "ab")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.ByteFallback()
    core.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )

    found = read_vocabulary(tokenizer, len(words))

    assert (found.model, found.pre, found.merges, found.add_space_prefix) == ("llama", "default", [], True)
    assert found.types[:4] == [vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL, vocabulary.BYTE]
    assert found.scores[words.index("ab")] > found.scores[words.index("▁ab")] > found.scores[words.index("a")]
