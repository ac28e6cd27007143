"""What the files of a model's folder say at a glance."""

from pathlib import Path
from typing import Any

from qlora_contract.files import read_json
from qlora_operator.api.v1alpha1 import Training


def has_template(model: Path) -> bool:
    """Whether it has a chat template."""
    if (model / "chat_template.jinja").is_file() or (model / "chat_template.json").is_file():
        return True
    return bool(read_object(model / "tokenizer_config.json").get("chat_template"))


def positions(model: Path) -> int | None:
    """How long its texts may be, in tokens; None: its config.json does not say."""
    config = read_object(model / "config.json")
    text = config.get("text_config")
    found = config.get(
        "max_position_embeddings", text.get("max_position_embeddings") if isinstance(text, dict) else None
    )
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def usual_length(model: Path | None) -> int:
    """training.maxSequenceLength of a job on a model: the API's default, or what the model has, if that is less."""
    default: int = Training.model_fields["max_sequence_length"].default
    return min(default, (model and positions(model)) or default)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
