"""The `kubectl-qlora` command, which kubectl finds as `kubectl qlora`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_contract.export import forms_of
from qlora_contract.job_folder import EXPORTS
from qlora_operator.api.status import Columns, QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli import main as qlora
from qlora_operator.cli.chat import chat
from qlora_operator.cli.chat_arguments import add_chat, add_compare, bounded, chat_settings
from qlora_operator.cli.compare import compare, read_prompts
from qlora_operator.cli.display import printable
from qlora_operator.cli.export_arguments import add_formats, output_of
from qlora_operator.cli.outcome import error_message
from qlora_operator.client import Client, ClusterError
from qlora_operator.errors import CommandError
from qlora_operator.kubectl.chat_pod import chat_pod
from qlora_operator.kubectl.export_pod import export_pod
from qlora_operator.kubectl.pod_exchange import pod_model, read_pod, running_pod, wait_until_ended

EXIT_CODES = """\
exit codes:
  0    done
  1    the cluster refused, or could not be reached
  2    wrong arguments, or a file with errors
  10-  of chat, compare and export: a job's own, docs/reference/exit-codes.md
  130  ended by Ctrl-C
"""
ATTEMPTS_SHOWN = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; what is no command of a cluster is `qlora`'s."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in qlora.COMMANDS and given[0] not in COMMANDS:
        return qlora.main(given)
    return qlora.guarded(lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    client = Client(kubeconfig=options.kubeconfig, context=options.context, namespace=options.namespace)
    return COMMANDS[options.command](client, options)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    command = argparse.ArgumentParser(
        prog="kubectl qlora",
        description="QLoRAJobs of a cluster. Commands of one machine (validate, plan, run, fetch) are those of qlora.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subcommands = command.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {
        "list": subcommands.add_parser("list", aliases=["get"], help="list the jobs"),
        "status": subcommands.add_parser("status", aliases=["describe"], help="show how a job is, and why"),
        "logs": subcommands.add_parser("logs", help="print the log of a job's pod"),
        "suspend": subcommands.add_parser("suspend", help="stop a job's pods after a checkpoint"),
        "resume": subcommands.add_parser("resume", help="continue a suspended job from its checkpoint"),
        "restart": subcommands.add_parser(
            "restart", help="suspend a job, wait for its pods to stop, and resume it"
        ),
        "export": subcommands.add_parser(
            "export", help="make a merged model or GGUF files of a finished job's adapter"
        ),
        "chat": add_chat(subcommands),
        "compare": add_compare(subcommands),
    }
    for name, subcommand in made.items():
        subcommand.add_argument("--kubeconfig", metavar="FILE", type=_file, help="path of the kubeconfig")
        subcommand.add_argument("--context", metavar="NAME", help="the kubeconfig's context")
        subcommand.add_argument("-n", "--namespace", metavar="NAME", help="the jobs' namespace")
        if name != "list":
            subcommand.add_argument("job", metavar="JOB", help="the job's name")
    made["list"].add_argument(
        "-A", "--all-namespaces", action="store_true", help="the jobs of all namespaces"
    )
    logs = made["logs"]
    logs.add_argument("-f", "--follow", action="store_true", help="wait for more lines until the pod ends")
    logs.add_argument(
        "--pod", type=int, default=0, metavar="INDEX", help="which pod; default: 0, which has rank 0"
    )
    logs.add_argument(
        "--attempt", type=int, metavar="N", help="which attempt; default: the newest that has a pod"
    )
    made["restart"].add_argument(
        "--timeout", type=bounded(float, 0, 1e6), default=600.0, metavar="SECONDS",
        help="for the pods to stop; default: 600",
    )  # fmt: skip
    add_formats(made["export"])
    for name in ("chat", "compare", "export"):
        made[name].add_argument(
            "--pod-running-timeout", type=bounded(float, 0, 1e6), default=300.0, metavar="SECONDS",
            help="for the pod to run; default: 300",
        )  # fmt: skip
    return command


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return text


def _list(client: Client, options: argparse.Namespace) -> int:
    jobs = client.jobs(all_namespaces=options.all_namespaces)
    if not jobs:
        where = "all namespaces" if options.all_namespaces else f"namespace {client.namespace}"
        print(f"no jobs in {where}", file=sys.stderr)
        return 0
    Console(highlight=False, soft_wrap=True).print(jobs_table(jobs, namespaces=options.all_namespaces))
    return 0


def jobs_table(jobs: Sequence[QLoRAJob], *, namespaces: bool) -> Table:
    """The jobs with the columns of `kubectl get`."""
    headings = ["NAME", "PHASE", "RANKS", "STEP", "LOSS", "TOK/S", "ETA", "RESTARTS"]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in [*(["NAMESPACE"] if namespaces else []), *headings]:
        table.add_column(heading, no_wrap=True)
    for job in jobs:
        status = job.status or QLoRAJobStatus()
        columns = status.columns or Columns()
        cells = [
            *([job.metadata.namespace] if namespaces else []),
            job.metadata.name, status.phase, columns.ranks, columns.step, columns.loss, columns.tokens_per_second,
            columns.eta, columns.restarts,
        ]  # fmt: skip
        table.add_row(*(Text(printable(str(cell)) if cell is not None else "-") for cell in cells))
    return table


def _status(client: Client, options: argparse.Namespace) -> int:
    for line in status_lines(client.get(options.job)):
        print(printable(line))
    return 0


def status_lines(job: QLoRAJob) -> list[str]:
    """How a job is, and why."""
    status = job.status or QLoRAJobStatus()
    lines = [
        f"{job.metadata.namespace}/{job.metadata.name}: {status.phase or 'not seen by the operator yet'}"
    ]
    if status.message:
        lines.append(f"  {status.message}")
    if (progress := status.progress) is not None and progress.total_steps:
        columns = status.columns or Columns()
        known = {
            "loss": columns.loss, "eval loss": progress.eval_loss, "tokens/s": columns.tokens_per_second,
            "ETA": columns.eta,
        }  # fmt: skip
        facts = "".join(f", {name} {value}" for name, value in known.items() if value is not None)
        lines.append(f"progress    step {progress.step}/{progress.total_steps}{facts}")
    if status.checkpoint is not None and status.checkpoint.step is not None:
        lines.append(f"checkpoint  step {status.checkpoint.step}")
    if status.placement is not None and status.placement.nodes:
        lines.append(f"placement   {status.placement.isa} on {', '.join(status.placement.nodes)}")
    if (adapter := status.adapter) is not None:
        losses = f"eval loss {adapter.eval_loss}, base {adapter.base_eval_loss}"
        lines.append(f"adapter     {adapter.published_uri or adapter.uri} ({losses})")
    if status.conditions:
        lines.append("conditions")
        lines += [
            f"  {condition.type:<14} {condition.status:<8} {condition.reason}"
            for condition in status.conditions
        ]
    if status.attempts:
        lines.append("attempts")
        for attempt in status.attempts[-ATTEMPTS_SHOWN:]:
            how = f"{attempt.reason}: {attempt.message}" if attempt.end else "open"
            lines.append(f"  {attempt.attempt:<3} {attempt.stage:<8} {how}")
    return lines


def _logs(client: Client, options: argparse.Namespace) -> int:
    lines = client.logs(options.job, follow=options.follow, index=options.pod, attempt=options.attempt)
    for line in lines:
        print(printable(line), flush=options.follow)
    return 0


def _suspend(client: Client, options: argparse.Namespace) -> int:
    client.suspend(options.job)
    print(f"{options.job}: suspended; its pods stop after a checkpoint")
    return 0


def _resume(client: Client, options: argparse.Namespace) -> int:
    client.resume(options.job)
    print(f"{options.job}: resumed")
    return 0


def _restart(client: Client, options: argparse.Namespace) -> int:
    print(f"{options.job}: waiting for its pods to stop after a checkpoint ...", file=sys.stderr)
    client.restart(options.job, options.timeout)
    print(f"{options.job}: restarted")
    return 0


def _chat(client: Client, options: argparse.Namespace) -> int:
    """`chat` or `compare`."""
    questions = read_prompts(options.prompts) if options.command == "compare" else []
    job, template = client.training_template(options.job)
    with pod_model(client, chat_pod(job, template), options.pod_running_timeout) as exchange:
        if options.command == "chat":
            return chat(exchange, chat_settings(options), base_only=options.base)
        console = Console(highlight=False)
        return compare(exchange, questions, chat_settings(options), output=options.output, console=console)


def _export(client: Client, options: argparse.Namespace) -> int:
    output = output_of(options)
    job, template = client.training_template(options.job)
    pod = export_pod(job, template, output)
    with running_pod(client, pod, options.pod_running_timeout, may_end=True) as name:
        try:
            for line in client.pod_log(name, follow=True):
                print(printable(line), file=sys.stderr, flush=True)
        except ClusterError as error:  # how the pod ends is what counts
            print(f"its log cannot be followed: {error}", file=sys.stderr)
        code, cause = wait_until_ended(lambda: read_pod(client, name))
    if code != 0:
        raise CommandError(error_message(code, cause), code)
    try:
        client.tell_exported(options.job, forms_of(output))
    except ClusterError as error:  # they are made all the same
        print(f"status.adapter.exports will not name them: {error}", file=sys.stderr)
    for form in forms_of(output):
        print(f"{job.spec.workspace.rstrip('/')}/jobs/{options.job}/{EXPORTS}/{form}")
    return 0


COMMANDS: dict[str, Callable[[Client, argparse.Namespace], int]] = {
    "list": _list,
    "get": _list,
    "status": _status,
    "describe": _status,
    "logs": _logs,
    "suspend": _suspend,
    "resume": _resume,
    "restart": _restart,
    "chat": _chat,
    "compare": _chat,
    "export": _export,
}
