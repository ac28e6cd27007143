"""What `--help` says below the options: examples, and the exit codes."""

import textwrap

from qlora_contract.exit_codes import command_codes

EXAMPLES = {
    "qlora": """\
examples:
  qlora init                                         write a job's file; asks for model and data
  qlora run --model ./SmolLM2-135M-Instruct --data docs.jsonl
                                                     train without a file, for a first try
  qlora plan job.yaml                                memory, steps, time and a sample, before training
  qlora run job.yaml                                 train; the same command goes on after a stop
  qlora chat job.yaml                                talk to the result
""",
    "init": """\
examples:
  qlora init
  qlora init --model hf://HuggingFaceTB/SmolLM2-135M-Instruct --data docs.jsonl
  qlora init --for cluster --where pvc://team-data/qlora --model /srv/models/X --data docs.jsonl -o job.yaml
""",
    "validate": """\
examples:
  qlora validate job.yaml other/*.yaml
  helm template chart | qlora validate -
  qlora validate job.yaml --set training.epochs=5 -o json
""",
    "plan": """\
examples:
  qlora plan job.yaml
  qlora plan --model ./SmolLM2-135M-Instruct --data docs.jsonl
  qlora plan job.yaml --volume team-data=/srv/data --set adapter.rank=32 -o json
""",
    "check": """\
examples:
  qlora check docs.jsonl
  qlora check docs.jsonl --model ./SmolLM2-135M-Instruct
  qlora check job.yaml -o json
""",
    "fetch": """\
examples:
  qlora fetch job.yaml
""",
    "run": """\
examples:
  qlora run job.yaml
  qlora run --model ./SmolLM2-135M-Instruct --data docs.jsonl --set training.maxSteps=20
  qlora run job.yaml --volume team-data=/srv/data --name second
  qlora run --model ./SmolLM2-135M-Instruct --data faq.csv --columns instruction=question,output=answer
  adapter=$(qlora run job.yaml --quiet)
""",
    "export": """\
examples:
  qlora export job.yaml --format merged
  qlora export qlora/jobs/docs --format gguf --gguf-type q4_k_m
""",
    "report": """\
examples:
  qlora report qlora/jobs/docs
""",
    "chat": """\
examples:
  qlora chat job.yaml
  qlora chat qlora/jobs/docs --base
  qlora chat job.yaml --max-tokens 100 < questions.txt
""",
    "compare": """\
examples:
  qlora compare job.yaml --prompts questions.txt
  qlora compare qlora/jobs/docs --prompts held-out.jsonl -o json
""",
    "completion": """\
examples:
  source <(qlora completion bash)                                        in ~/.bashrc
  qlora completion zsh > "${fpath[1]}/_qlora"
  qlora completion fish > ~/.config/fish/completions/qlora.fish
""",
}
"""Subcommand, or the command itself, -> examples."""

_FEW = {
    "init": (0, 2, 11, 12, 130),
    "validate": (0, 2, 130),
    "report": (0, 1, 2, 130),
    "completion": (0, 2),
}
"""Subcommands that have few codes."""


def exit_codes(subcommand: str | None = None) -> str:
    """Exit codes and their meaning; None: those of all subcommands."""
    codes = command_codes()
    lines = ["exit codes:"]
    for code in _FEW.get(subcommand or "", tuple(codes)):
        lines += textwrap.wrap(
            codes[code], width=100, initial_indent=f"  {code:<5}", subsequent_indent=" " * 7
        )
    return "\n".join(lines) + "\n"
