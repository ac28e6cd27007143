"""A tokenizer as GGUF's metadata: what llama.cpp must know to make the same tokens of a text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_trainer.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""gguf.TokenType."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS: Mapping[str, str] = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    ): "qwen35",
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ): "tekken",
}
"""The expression that splits a text into words -> llama.cpp's name of it."""


@dataclass(frozen=True)
class Vocabulary:
    """What of GGUF's metadata describes a tokenizer."""

    model: str
    """`gpt2`: byte-level BPE; `llama`: SentencePiece's BPE."""
    pre: str
    """How a text is split into words, by llama.cpp's name."""
    tokens: list[str]
    types: list[int]
    """Of the constants above."""
    merges: list[str]
    """Of byte-level BPE, the first first; else empty."""
    scores: list[float]
    """Of SentencePiece, the best merge highest; else empty."""
    add_bos: bool
    """Whether a text begins with the token for that."""
    add_space_prefix: bool
    """Whether a text's first word gets a space before it."""


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers.

    Args:
        tokenizer: a fast one.
        rows: of the embedding; ids beyond the tokenizer's are filled up.

    Raises:
        ModelError: llama.cpp has no name for how it works, and would make other tokens.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    model = core["model"]
    if model["type"] != "BPE":
        raise ModelError(f"a tokenizer of the kind {model['type']} cannot be exported to GGUF; only BPE can")
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _tokens(model["vocab"], core["added_tokens"], model.get("unk_token"), rows, sentencepiece)
    bos = tokenizer.bos_token_id
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else pre_tokenizer_name(core["pre_tokenizer"]),
        tokens=tokens,
        types=types,
        merges=[] if sentencepiece else [" ".join(pair) for pair in merges],
        scores=_scores(tokens, merges) if sentencepiece else [],
        add_bos=bos is not None and tokenizer("a")["input_ids"][:1] == [bos],
        add_space_prefix=sentencepiece and _adds_space(core),
    )


def pre_tokenizer_name(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """llama.cpp's name for how byte-level BPE splits a text into words.

    Raises:
        ModelError: it has none that we know.
    """
    parts = [pre_tokenizer or {}]
    if parts[0].get("type") == "Sequence":
        parts = parts[0]["pretokenizers"]
    last = parts[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        match parts[:-1]:
            case [] if last.get("use_regex", True):
                return "gpt-2"
            case [{"type": "Digits", "individual_digits": True}] if last.get("use_regex", True):
                return "smollm"
            case [{"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}]:
                if expression in _SPLITS and not last.get("use_regex", True):
                    return _SPLITS[expression]
    kinds = ", ".join(str(part.get("type")) for part in parts)
    raise ModelError(
        f"the tokenizer splits texts into words in a way ({kinds}) that llama.cpp has no known name for, and a GGUF "
        "file would give other tokens than the model was trained on; export it as merged instead"
    )


def _tokens(
    vocab: Mapping[str, int], added: list[dict[str, Any]], unknown: str | None, rows: int, sentencepiece: bool
) -> tuple[list[str], list[int]]:
    """Text and type of each id from 0 to rows - 1."""
    tokens = [f"[PAD{id_}]" for id_ in range(rows)]
    types = [UNUSED] * rows
    for text, id_ in vocab.items():
        if id_ < rows:
            is_byte = (
                sentencepiece and len(text) == len("<0x00>") and text.startswith("<0x") and text.endswith(">")
            )
            tokens[id_], types[id_] = text, BYTE if is_byte else NORMAL
    for token in added:
        if token["id"] < rows:
            tokens[token["id"]] = token["content"]
            types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if sentencepiece and unknown is not None and unknown in vocab:
        types[vocab[unknown]] = UNKNOWN
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece merges the pair whose token scores best; here, the one that is merged first."""
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    return [-float(order.get(token, len(order))) for token in tokens]


def _adds_space(core: Mapping[str, Any]) -> bool:
    """Whether a text's first word gets a space before it, as older and newer tokenizer.json files put it."""
    normalizer, pre = core["normalizer"] or {}, core["pre_tokenizer"] or {}
    normalizers = normalizer.get("normalizers", [normalizer])
    pre_tokenizers = pre.get("pretokenizers", [pre])
    return any(each.get("type") == "Prepend" for each in normalizers) or any(
        each.get("type") == "Metaspace" and each.get("prepend_scheme", "always") != "never"
        for each in pre_tokenizers
    )
