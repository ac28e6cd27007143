"""Exports, and what stock transformers and peft say, to hold other programs against."""

from pathlib import Path
from typing import Any

PROMPT = "<|im_start|>user\nWhat does a list do?<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 20


class Silent:
    """A Listener that nobody listens to."""

    def begin(self, *_: object) -> None:
        """Something is begun."""

    def advance(self, *_: object) -> None:
        """Some of it is done."""

    def exported(self, *_: object) -> None:
        """A form is finished."""


def exported(model: Path, adapter: Path, output: Path, *forms: Any) -> Path:
    """The folder of these forms."""
    from qlora_contract.export import ExportRequest
    from qlora_trainer.export.exporting import export

    request = ExportRequest(
        name="demo", model=str(model), adapter=str(adapter), output=str(output), forms=list(forms)
    )
    export(request, Silent(), lambda: None)
    return output


def base_as_gguf(folder: Path, file: Path) -> Path:
    """The base without an adapter, as f16."""
    from transformers import AutoTokenizer

    from qlora_trainer.export.adapter_weights import AdapterWeights
    from qlora_trainer.export.gguf import Metadata, plan_model, write_model
    from qlora_trainer.export.merged_weights import plan_tensors
    from qlora_trainer.export.vocabulary import read_vocabulary
    from qlora_trainer.modeling.families import read_model

    (family, config), tokenizer = read_model(folder), AutoTokenizer.from_pretrained(folder)
    tensors = plan_model(plan_tensors(folder, family, AdapterWeights({}, None)), config, "f16")
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    metadata = Metadata("base", config, "f16", read_vocabulary(tokenizer, config.vocab_size), None, special)
    write_model(file, tensors, metadata, lambda _: None)
    return file


def stock_model(folder: Path) -> Any:
    """transformers' model of a folder, in fp32, of the class whose names adapters have: a multimodal one's is whole."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    whole = hasattr(AutoConfig.from_pretrained(folder), "text_config")
    chosen: Any = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    return chosen.from_pretrained(folder, dtype=torch.float32)


def prompt_ids(model: Path) -> list[int]:
    """PROMPT, in the model's tokens."""
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(model)(PROMPT)["input_ids"]
    return ids


def by_peft(model: Path, adapter: Path) -> tuple[list[int], list[int]]:
    """The next TOKENS greedy tokens after PROMPT: with the adapter, and without, in fp32."""
    import torch
    from peft import PeftModel

    prompt = prompt_ids(model)
    wrapped = PeftModel.from_pretrained(stock_model(model), adapter).eval()

    def greedy() -> list[int]:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(TOKENS):
                ids.append(int(wrapped(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    with wrapped.disable_adapter():
        without = greedy()
    return greedy(), without
