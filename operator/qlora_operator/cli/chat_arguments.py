"""What `chat` and `compare` are told on the command line."""

import argparse
from collections.abc import Callable

from qlora_contract.chat import MAX_TOKENS
from qlora_operator.cli.chat import Settings

EXIT_CODES = """\
exit codes:
  0    done
  1    an unexpected error
  2    wrong arguments, or a file with errors
  10   the job's folder belongs to another spec or has no adapter yet, or the settings do not fit the model
  12   the base model cannot be read, or is not the one that the adapter was trained on
  130  ended by Ctrl-C
The others are a job's own: docs/reference/exit-codes.md.
"""


def add_chat(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add `chat` to a command, but for what names a job."""
    chatting = subcommands.add_parser(
        "chat",
        help="talk to a job's model, also while it trains",
        description="Talk to a job's model as it was trained: with the finished adapter, or the newest checkpoint.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chatting.add_argument("--base", action="store_true", help="the base alone, without the adapter")
    _add_settings(chatting)
    return chatting


def add_compare(
    subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    """Add `compare` to a command, but for what names a job."""
    comparing = subcommands.add_parser(
        "compare",
        help="show what the base and the adapter answer to the same prompts",
        description="Show what the base and the adapter answer to the same prompts, side by side.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comparing.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="records as training data have them, one JSON object a line, or plain lines; - is standard input",
    )
    comparing.add_argument(
        "-o", "--output", choices=["table", "json"], default="table", help="default: table"
    )
    _add_settings(comparing)
    return comparing


def _add_settings(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument("--system", metavar="TEXT", help="a system message before every conversation")
    subcommand.add_argument(
        "--max-tokens", type=bounded(int, 1, 1_048_576), default=MAX_TOKENS, metavar="N",
        help=f"tokens of an answer, at most; default: {MAX_TOKENS}",
    )  # fmt: skip
    subcommand.add_argument(
        "--temperature", type=bounded(float, 0, 100), default=0.0, metavar="T",
        help="above 0 answers are drawn by chance; default: 0, the most probable token each time",
    )  # fmt: skip
    subcommand.add_argument(
        "--top-p", type=bounded(float, 1e-6, 1), default=1.0, metavar="P",
        help="draw from the most probable tokens that together have this probability; default: 1",
    )  # fmt: skip
    subcommand.add_argument(
        "--seed", type=bounded(int, 0, 2**32 - 1), default=0, metavar="N",
        help="equal seeds draw equal answers; default: 0",
    )  # fmt: skip


def bounded(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    """A type of argument: a number between two others."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}")
        return value

    return number


def chat_settings(options: argparse.Namespace) -> Settings:
    """How answers are made."""
    return Settings(options.system, options.max_tokens, options.temperature, options.top_p, options.seed)
