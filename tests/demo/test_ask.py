"""The demo's question, asked with and without the adapter."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "demo" / "ask.py"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 avx2\n", True),
        ("processor : 0\nflags\t\t: fpu amx_tile amx_bf16\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\nbugs : amx_bf16\n", False),
        ("processor : 0\nFeatures : asimd bf16\n", False),
        ("", False),
    ],
    ids=["avx512_bf16", "amx", "avx512 without bf16", "another architecture", "empty"],
)
def test_bf16_is_used_where_the_processor_has_it(ask: ModuleType, cpuinfo: str, expected: bool) -> None:
    """The dtype follows the processor's own flags."""
    assert ask.computes_bf16(cpuinfo) is expected


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    """A wrong folder ends in one line that says which and what it lacks, without asking the Hub."""
    result = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, tmp_path, "Why?"], capture_output=True, text=True, check=False
    )

    assert result.returncode == 1
    assert result.stderr == f"demo/ask.py: {tmp_path} is not a model's folder: it has no config.json\n"


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_base_and_adapter_answer_apart(ask: ModuleType, written: Path, tmp_path: Path) -> None:
    """Both answers are shown: a random adapter's differs from the base's, which is that of the base alone."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    dtype = torch.bfloat16 if ask.computes_bf16(Path("/proc/cpuinfo").read_text()) else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(written)
    alone = ask.answer(base.to(dtype), tokenizer, ask.QUESTION)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")

    result = subprocess.run(
        [sys.executable, SCRIPT, written, tmp_path / "adapter"],
        capture_output=True,
        text=True,
        check=True,
    )

    without, with_adapter = result.stdout.partition("Base model\n")[2].split("\n\nWith the adapter\n")
    assert without.strip() == alone
    assert with_adapter.strip() != alone
