"""The code blocks of the documentation, and what becomes of each command in them: run on this machine, run against an
API server, or not run, for a reason.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/one-machine.md",  # first, since others use its job
    *sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "docs").rglob("*.md")
        if path.name != "one-machine.md" and "decisions" not in path.parts
    ),
    "charts/qlora-operator/README.md",
]
PROGRAMS = frozenset(
    {
        "llama-server",
        "buildah",
        "cosign",
        "openssl",
        "tensorboard",
        "ctr",
        "printf",
        "optimum-cli",
        "docker",
        "helm",
        "make",
        "eval",
        "echo",
        "tar",
        "ollama",
        "pip",
        "pipx",
        "cd",
        "vllm",
        "curl",
        "sed",
        "python",
        "qlora",
        "kind",
        "kubectl",
    }
)
"""What a line of commands begins with; no other kind of block may."""

NOT_RUN = {
    "make demo": "minutes of training; tests/demo runs its parts, and the end-to-end tests its job",
    "make images": "needs docker, podman or buildah with a network; the end-to-end tier builds the same images",
    "make cluster-demo": "the end-to-end tier does the same",
    'eval "$(make -s cluster-env NAME=demo)"': "needs the cluster of make cluster-demo",
    "kubectl -n team describe qlj demo": "needs the cluster of make cluster-demo",
    "make cluster-down": "needs the cluster of make cluster-demo",
    "docker": "needs docker and a registry",
    "kind": "needs docker",
    "cosign": "cosign is not installed; tests/manifests/test_provenance.py verifies by another implementation",
    "openssl": "needs a release; tests/manifests/test_provenance.py makes a key, signs and verifies",
    "buildah": "needs an image that buildah has built",
    "ctr": "needs containerd, as root",
    "pip install": "needs the network, and would change the environment of the tests; the locks name the same extras",
    "pipx install": "likewise",
    "qlora plan hf://": "needs the Hub; tests/qlora_operator/cli/test_size.py plans a model of a played one",
    "python -m qlora_trainer.native.build": "minutes of compiling; tests/qlora_trainer/native runs it",
    ".venv/bin/qlora export .cache/demo": "needs the result of make demo; docs/export.md has the same for another job",
    "cd .cache/demo": "needs the result of make demo",
    "python demo/ask.py FOLDER": "the same command, with other folders, is in docs/serving.md, and run",
    "llama-server": "the program is not installed; tests/qlora_trainer/export/test_gguf.py asks the same server",
    "curl localhost:8080": "asks llama.cpp's server, as tests/qlora_trainer/export/test_gguf.py does",
    "cd /srv/data/qlora/jobs/smollm2-docs/exports/gguf-q4_k_m && ollama": "Ollama is not installed",
    "ollama": "Ollama is not installed",
    "vllm": "vLLM is not installed",
    "optimum-cli": "optimum-intel is not installed",
    "tensorboard --logdir": "serves until it is stopped; tests/qlora_trainer/artifacts reads the event files",
    "echo madvise": "would change this machine; needs root",
    "kubectl -n qlora-system rollout status": "needs nodes that run the operator: tests/e2e/test_release.py",
    "helm -n qlora-system test": "needs nodes: tests/e2e/test_release.py",
    "helm upgrade": "needs a release: tests/e2e/test_release.py",
    "helm -n qlora-system rollback": "needs a release: tests/e2e/test_release.py",
    "helm -n qlora-system uninstall": "needs a release: tests/e2e/test_release.py",
    "tar -c -C FOLDER models docs.jsonl | kubectl": "needs a pod that runs; make cluster-demo copies data so",
    "kubectl -n team exec": "needs a pod that runs; make cluster-demo copies results so",
    "kubectl -n team get qlj -w": "watches until it is stopped; the same without -w is run",
    "kubectl -n team wait": "needs nodes that train; the end-to-end tier waits so",
    "kubectl wait": "needs nodes that train; the end-to-end tier waits so",
    "kubectl logs": "needs a pod that runs; the end-to-end tier reads logs so",
}
"""Beginning of a command -> why no test of these runs it."""


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    line: int
    language: str
    """The first word behind the fence; empty for an indented block."""
    name: str
    """The second: the file that the block is."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Of a block of shell commands: each, on one line, without comments."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        joined = re.sub(r"\|\n\s*", "| ", joined)
        lines = [re.sub(r"(^|\s+)# .*$", "", line).strip() for line in joined.splitlines()]
        return [line for line in lines if line]


def blocks() -> Iterator[Block]:
    """Every code block of every page, in order."""
    for page in PAGES:
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        number = 0
        while number < len(lines):
            fence = re.match(r"^( *)```(\S*) ?(\S*)", lines[number])
            if fence:
                indent, start = fence[1], number + 1
                number = next(at for at in range(start, len(lines)) if lines[at].strip() == "```")
                text = "\n".join(line.removeprefix(indent) for line in lines[start:number])
                yield Block(page, start + 1, fence[2], fence[3], text)
            elif lines[number].startswith("    ") and not lines[number - 1].strip():
                start = number
                while number < len(lines) and lines[number].startswith("    "):
                    number += 1
                yield Block(page, start + 1, "", "", "\n".join(line.strip() for line in lines[start:number]))
            number += 1


def reason_not_to_run(command: str) -> str | None:
    """Why a command is not run; None: a test runs it."""
    return next((reason for beginning, reason in NOT_RUN.items() if command.startswith(beginning)), None)


def needs_cluster(command: str) -> bool:
    """Whether a command talks to an API server."""
    return bool(re.search(r"(^|\| )(kubectl|helm) ", command))


def commands(*, of_cluster: bool) -> list[tuple[Block, str]]:
    """What is to be run: each command with the block that has it first."""
    first: dict[str, Block] = {}
    for block in blocks():
        for command in block.commands if block.language == "sh" else ():
            if reason_not_to_run(command) is None and needs_cluster(command) == of_cluster:
                first.setdefault(command, block)
    return [(block, command) for command, block in first.items()]
