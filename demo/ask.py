"""Ask the base model and the adapter the same question: `python demo/ask.py MODEL_FOLDER ADAPTER_FOLDER [QUESTION]`.

Stock transformers and peft, on the files alone: what they print is what any
other program that loads the adapter gets.
"""

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import Any

QUESTION = "What does `itertools.chain` do?"
"""Asked unless another is given; itertools is not among the modules that the demo trains on."""
NEW_TOKENS = 64
NATIVE_BF16 = {"amx_bf16", "avx512_bf16"}
"""Flags of processors that compute in bf16 natively; elsewhere it is emulated, slower than fp32."""


def computes_bf16(cpuinfo: str) -> bool:
    """Whether the processor that this text of /proc/cpuinfo describes computes in bf16 natively."""
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return not NATIVE_BF16.isdisjoint(flags.split())


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The model's greedy answer of at most NEW_TOKENS tokens."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    text: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def answers(model_folder: Path, adapter_folder: Path, question: str) -> tuple[str, str]:
    """What the base model answers, and what it answers with the adapter."""
    # What peft calls in transformers, and what bitsandbytes misses when peft imports it, is nothing for the reader.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore", FutureWarning)
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    dtype = torch.bfloat16 if computes_bf16(Path("/proc/cpuinfo").read_text()) else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    model = PeftModel.from_pretrained(base, adapter_folder).eval()
    with model.disable_adapter():
        without = answer(model, tokenizer, question)
    return without, answer(model, tokenizer, question)


def require_file(folder: Path, name: str, what: str) -> None:
    """Exit with a sentence unless the folder has the file: a missing one would be looked up on the Hub."""
    if not (folder / name).is_file():
        raise SystemExit(f"demo/ask.py: {folder} is not {what}: it has no {name}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Ask the base model and the adapter the same question.")
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("question", nargs="?", default=QUESTION)
    arguments = parser.parse_args()
    require_file(arguments.model, "config.json", "a model's folder")
    require_file(arguments.adapter, "adapter_config.json", "an adapter's folder")
    os.environ["HF_HUB_OFFLINE"] = "1"
    without, with_adapter = answers(arguments.model, arguments.adapter, arguments.question)
    print(
        f"Question\n  {arguments.question}\n\nBase model\n  {without}\n\nWith the adapter\n  {with_adapter}"
    )


if __name__ == "__main__":
    main()
