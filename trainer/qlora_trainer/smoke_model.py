"""Write a model and data so small that a job on them shows within a minute whether an installation works.

    python -m qlora_trainer.smoke_model FOLDER     # writes FOLDER/model and FOLDER/data.jsonl

Nothing is downloaded: the weights are random, the tokenizer has a token for each byte, and the data repeats one pattern
that a few steps are enough to learn. Every call writes the same bytes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qlora_trainer.errors import from_os_error

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
RECORDS = 200


def write(folder: Path) -> None:
    """Write FOLDER/model, as the Hub has models, and FOLDER/data.jsonl with chats. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder / "model")
    _model(len(tokenizer), tokenizer.eos_token_id).save_pretrained(folder / "model")
    with (folder / "data.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(RECORDS):
            question = {"role": "user", "content": f"What comes after {number}?"}
            answer = {"role": "assistant", "content": f"After {number} comes {number + 1}."}
            print(json.dumps({"messages": [question, answer]}), file=stream)


def _tokenizer() -> Any:
    """A token for each byte and for each mark of the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    end = SPECIAL[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=end, pad_token=end, chat_template=TEMPLATE
    )


def _model(vocabulary: int, end: int) -> Any:
    """A Llama of two layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return AutoModelForCausalLM.from_config(config)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_trainer.smoke_model", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    try:
        write(folder)
    except OSError as error:
        known = from_os_error(error, "writing the model") or error
        print(f"{folder} cannot be written: {known}", file=sys.stderr)
        return 1
    print(f"{folder}: a random model of two layers, and {RECORDS} chats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
