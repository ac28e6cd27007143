"""Ollama's Modelfile: which file, how a conversation is written, where an answer ends, how tokens are drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_contract.files import read_json
from qlora_trainer.export.chat_format import ChatFormat

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""generation_config.json's names of Ollama's parameters."""


def modelfile(
    gguf: str, chat: ChatFormat | None, bos: str | None, stops: Sequence[str], generation: Mapping[str, Any]
) -> str:
    """The text of a Modelfile.

    Args:
        gguf: name of the GGUF file, which lies beside it.
        chat: how conversations are written; None: Ollama is left with the template in the GGUF file.
        bos: the token that Ollama puts before a text by itself; None: it puts none.
        stops: texts that end an answer.
        generation: generation_config.json.
    """
    lines = [f"FROM ./{gguf}"]
    template = None if chat is None else go_template(chat, bos)
    if template is None:
        lines.append(
            "# The chat template cannot be written in Ollama's language: of its own it takes the one that is most like "
            "that in the GGUF file, if one is."
        )
    else:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops if _can_be_written(stop)]
    if generation.get("do_sample"):
        drawn = {_SAMPLING[name]: value for name, value in generation.items() if name in _SAMPLING}
        lines += [f"PARAMETER {name} {value:g}" for name, value in drawn.items() if value is not None]
    return "\n".join(lines) + "\n"


def go_template(chat: ChatFormat, bos: str | None) -> str | None:
    """The format in the language of Go's text/template; None where it has marks of that language itself."""
    start = chat.without_system.removeprefix(bos or "")
    system = chat.turns.get("system")
    before_system = "" if system is None else system.before.removeprefix(bos or "")
    pieces = [start, before_system, chat.answer]
    pieces += [text for turn in chat.turns.values() for text in (turn.before, turn.after)]
    if any("{{" in piece or "}}" in piece or not _can_be_written(piece) for piece in pieces):
        return None
    branches = [
        f'{{{{ if eq .Role "{role}" }}}}{before_system if role == "system" else turn.before}{{{{ .Content }}}}'
        f"{turn.after}{{{{ end }}}}"
        for role, turn in chat.turns.items()
    ]
    opening = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{start}{{{{ end }}}}' if start else ""
    return (
        f"{{{{ if .Messages }}}}{opening}{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}"
        + (chat.answer)
    )


def _can_be_written(text: str) -> bool:
    """Whether a Modelfile can hold a text: what ends it has no escape, and what is not printable is lost."""
    return '"""' not in text and all(char.isprintable() or char in "\n\t" for char in text)


def _quoted(text: str) -> str:
    marks = '"""' if '"' in text else '"'
    return f"{marks}{text}{marks}"


def stop_texts(tokenizer: Any, chat: ChatFormat | None, stop_ids: Sequence[int]) -> list[str]:
    """Texts that end an answer: the special tokens that follow one in a conversation, and those the model stops at."""
    after = "" if chat is None else chat.turns["assistant"].after
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [token for token in sorted(special, key=after.find) if token in after]
    found += [text for id_ in stop_ids if isinstance(text := tokenizer.convert_ids_to_tokens(id_), str)]
    return list(dict.fromkeys(found))


def generation_settings(folder: Path) -> dict[str, Any]:
    """generation_config.json of a model's folder; empty where there is none."""
    try:
        settings = read_json(folder / "generation_config.json")
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
