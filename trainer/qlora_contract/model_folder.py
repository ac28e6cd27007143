"""What the names of the files in a model's folder say: whether it can have weights and a tokenizer."""

from collections.abc import Collection

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
"""Names the shards, where there are several."""
NO_WEIGHTS = f"has neither {WEIGHTS} nor {WEIGHTS_INDEX}, nor a GGUF file; nothing else is read"
NO_TOKENIZER = (
    "has no tokenizer: copy tokenizer.json, and what begins with tokenizer, from where the model is from"
)

_TOKENIZERS = ("tokenizer", "vocab.", "merges.txt", "spiece.model", "sentencepiece", "tekken.json")
"""How their files' names begin."""


def has_weights(names: Collection[str]) -> bool:
    """Whether one of the files may hold the model's weights."""
    return WEIGHTS in names or WEIGHTS_INDEX in names or _has_gguf(names)


def has_tokenizer(names: Collection[str]) -> bool:
    """Whether one of the files may hold the tokenizer. A GGUF file does."""
    return any(name.startswith(_TOKENIZERS) or name.endswith(".tiktoken") for name in names) or _has_gguf(
        names
    )


def _has_gguf(names: Collection[str]) -> bool:
    return any(name.endswith(".gguf") for name in names)
