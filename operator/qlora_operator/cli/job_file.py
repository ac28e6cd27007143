"""The job that a command is about: of a file, with plain paths and --set, or of --model and --data alone.

A path of this machine is written as a URI on the claim `this-machine`, which is the whole file system: all behind this
module knows URIs only. No cluster has that claim.
"""

import argparse
import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_contract.containers import split_name
from qlora_contract.job_folder import RUN_CONFIG
from qlora_contract.paths import THIS_MACHINE, local_uri
from qlora_contract.remote import HUB_NAME, INITIAL_ADAPTER, is_remote
from qlora_operator.api import names
from qlora_operator.api.loader import STDIN, Amend, file_label, load_jobs, parse_job
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.cli.model_facts import usual_length
from qlora_operator.cli.settings import Setting, with_settings
from qlora_operator.errors import USAGE, CommandError, Fault, InvalidFileError, InvalidJobError

PATHS = ("workspace", "model.source", "dataset.source", "dataset.sources.source", INITIAL_ADAPTER)
"""Fields of spec that may be a path of this machine; one below a list stands for that of every item."""
JOB_SUFFIXES = (".yaml", ".yml")
WORKSPACE = "qlora"
"""Where a job without a file works, in the working directory."""
EPOCHS = 3
"""Of a job without a file: what small data want at least."""
NOT_WRITTEN = "1Gi"
"""memoryPerRank of a job without a file, which the API requires, until the machine's takes its place."""
FLAGS = {
    "metadata.name": "--name",
    "spec.model.source": "--model",
    "spec.dataset.source": "--data",
    "spec.dataset.columns": "--columns",
    "spec.workspace": "--workspace",
}


def given_job(options: argparse.Namespace) -> QLoRAJob:
    """The job that a command line names: of its file, or of --model and --data.

    Raises:
        InvalidFileError: the job is not valid.
        CommandError: there is not exactly one, or the arguments do not go together.
    """
    settings = [Setting(text) for text in getattr(options, "set", [])]
    model, data = getattr(options, "model", None), getattr(options, "data", None)
    if options.file is not None:
        flags = {"--model": model, "--data": data, "--columns": getattr(options, "columns", None) or None}
        if given := [flag for flag, value in flags.items() if value is not None]:
            raise CommandError(
                f"{' and '.join(given)} make a job without a file, and {options.file} is one: leave out the one or the "
                "other, or change a field of the file with --set, such as --set dataset.source=...",
                USAGE,
            )
        if why := _no_job(options.file):
            raise CommandError(f"{options.file} {why}", USAGE)
        return one_job(options.file, options.name, settings)
    if model is None or data is None:
        raise CommandError(
            f"give a job's file, or both --model and --data (see `qlora {options.command} --help`; `qlora init` writes "
            "a file)",
            USAGE,
        )
    named = columns(options.columns)
    return job_of_flags(model, data, options.name, options.workspace or WORKSPACE, settings, named)


def is_job_file(name: str) -> bool:
    """Whether an argument names a file with jobs rather than data: by its suffix, else by what it holds."""
    if name == STDIN or name.endswith(JOB_SUFFIXES):
        return True
    path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return b"QLoRAJob" in file.read(4096)


def _no_job(name: str) -> str | None:
    """What a path is that is given in place of a job's file, and how that is given; None: it may be a job's file."""
    path = Path(name)
    if path.is_dir():
        if (path / RUN_CONFIG).is_file():
            return "is a job's folder: give the job's file, or the --model and --data that it was run with"
        if (path / "config.json").is_file():
            return f"is a model: give --model {name}, and --data with it"
        return "is a folder: give a job's file, which `qlora init` writes, or --model and --data"
    if path.is_file() and split_name(name) and not is_job_file(name):
        return f"holds data, not a job: give --data {name}, and --model with it"
    return None


def one_job(file: str, name: str | None, settings: Sequence[Setting] = ()) -> QLoRAJob:
    """The job of a file, or the one of this name. Raises CommandError unless there is exactly one."""
    jobs = load_jobs(file, amendment(file, settings))
    label = file_label(file)
    known = ", ".join(job.metadata.name for job in jobs)
    if name is None and len(jobs) > 1:
        raise CommandError(f"{label} has {len(jobs)} jobs ({known}); choose one with --name", USAGE)
    chosen = [job for job in jobs if name in (None, job.metadata.name)]
    if len(chosen) != 1:
        raise CommandError(f"{label} has {len(chosen) or 'no'} jobs named {name!r}; it has: {known}", USAGE)
    return chosen[0]


def amendment(file: str, settings: Sequence[Setting] = ()) -> Amend:
    """What is changed of each job of a file: paths are relative to the file's folder, and in settings to our own."""
    folder = Path.cwd() if file == STDIN else Path(os.path.abspath(file)).parent  # noqa: PTH100 - links are kept

    def amend(document: dict[str, Any]) -> dict[str, Any]:
        return with_uris(with_settings(with_uris(document, folder), settings), Path.cwd())

    return amend


def job_of_flags(
    model: str,
    data: str,
    name: str | None,
    workspace: str,
    settings: Sequence[Setting] = (),
    named: Mapping[str, str] | None = None,
) -> QLoRAJob:
    """A job for a first try, with defaults for all else.

    Its name follows from the model and the data, so that the same command goes on with the same job. `named`: the
    columns of the data, as dataset.columns.
    """
    document: dict[str, Any] = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name or job_name(model, data)},
        "spec": {
            "workspace": workspace if is_uri(workspace) else local_uri(_absolute(workspace)),
            "model": {"source": model},
            "dataset": {"source": data, **({"columns": dict(named)} if named else {})},
            "training": {
                "epochs": EPOCHS,
                "maxSequenceLength": usual_length(None if is_uri(model) else _absolute(model)),
            },
            # A first try is never refused because something else computes here, too.
            "topology": {"pinning": "best-effort"},
        },
    }
    document = amendment(STDIN, settings)(document)
    topology = document["spec"].setdefault("topology", {})
    has_memory = not isinstance(topology, dict) or "memoryPerRank" in topology
    if not has_memory:
        topology["memoryPerRank"] = NOT_WRITTEN
    try:
        job = parse_job(document)
    except InvalidJobError as error:
        raise InvalidFileError([_of_flags(message, path) for path, message in error.faults]) from error
    assert job is not None, "it says that it is one"
    if not has_memory:
        # So that placement.local.on_this_machine fills it in.
        job.spec.topology.model_fields_set.discard("memory_per_rank")
    return job


def _of_flags(message: str, path: str) -> Fault:
    """What is wrong with a job without a file, by the argument that says it."""
    if path in FLAGS:
        return Fault(FLAGS[path], message, "")
    flag = next((flag for field, flag in FLAGS.items() if path.startswith(f"{field}.")), "--set")
    return Fault(flag, message, path)


def columns(texts: Sequence[str]) -> dict[str, str]:
    """`ours=theirs` of every --columns. Raises CommandError for another form."""
    pairs = [text.partition("=") for listed in texts for text in listed.split(",")]
    for ours, equals, theirs in pairs:
        if not (ours and equals and theirs):
            raise CommandError(
                "--columns: must be NAME=COLUMN, such as instruction=question,output=answer", USAGE
            )
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def job_name(model: str, data: str) -> str:
    """A name for a job on this model and these data: `smollm2-135m-docs`."""

    def plain(text: str) -> str:
        # `a/b/c.jsonl.gz` -> `c`
        last = [part for part in text.split("/") if part not in ("", ".", "..", "~")][-1:] or ["job"]
        return re.sub("[^a-z0-9]+", "-", last[0].lower()).strip("-")

    def stem(text: str) -> str:
        return re.sub(r"(\.[A-Za-z]+)+$", "", text.rstrip("/"))

    half = (names.MAX_JOB_NAME - 1) // 2
    of_data = plain(stem(data))[:half]
    name = f"{plain(model)[: names.MAX_JOB_NAME - 1 - len(of_data)]}-{of_data}".strip("-")
    return name if name[:1].isalpha() else f"job-{name}"[: names.MAX_JOB_NAME].strip("-")


# --- paths


def with_uris(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of a job's document with URIs in place of paths, which are relative to this folder."""
    changed = copy.deepcopy(document)
    for path in PATHS:
        *parents, last = path.split(".")
        for section in _sections(changed.get("spec"), parents):
            if isinstance(value := section.get(last), str):
                section[last] = uri_of(value, folder, may_be_a_repository=path != "workspace") or value
    return changed


def _sections(value: Any, parents: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The maps at this path below a value; of a list, those of every item."""
    if isinstance(value, list):
        for item in value:
            yield from _sections(item, parents)
    elif isinstance(value, dict) and parents:
        yield from _sections(value.get(parents[0]), parents[1:])
    elif isinstance(value, dict):
        yield value


def uri_of(value: str, folder: Path, *, may_be_a_repository: bool) -> str | None:
    """The URI of a path; None for what is none.

    What has no scheme is a path. `org/name` is one if it exists, or if there is a folder `org`, where a name is then
    misspelled: otherwise it is probably meant to be of the Hub.
    """
    if is_uri(value) or not value or "\0" in value:
        return None
    try:
        path = _absolute(value, folder)
    except RuntimeError:  # ~somebody who does not exist
        return None
    hub = may_be_a_repository and re.fullmatch(f"{HUB_NAME}/{HUB_NAME}", value)
    return local_uri(path) if not hub or os.path.lexists(path) or path.parent.is_dir() else None


def is_uri(value: str) -> bool:
    """Whether it has a scheme."""
    return "://" in value


def _absolute(value: str, folder: Path | None = None) -> Path:
    # Not Path.resolve: symbolic links are kept, so that a link to the newest data stays one.
    return Path(os.path.abspath((folder or Path.cwd()) / Path(value).expanduser()))  # noqa: PTH100


def plain_paths(job: QLoRAJob) -> dict[str, Path]:
    """Field of spec -> path, of those that are paths of this machine."""
    uris = {"workspace": job.spec.workspace}
    uris |= {source.uri_field: source.uri for source in job.spec.sources}
    prefix = local_uri(Path("/"))
    return {
        field: Path("/", uri.removeprefix(prefix))
        for field, uri in uris.items()
        if not is_remote(uri) and uri.startswith(prefix)
    }


def on_a_cluster(job: QLoRAJob) -> str | None:
    """How the job's paths read on a cluster, in a sentence; None where it has none."""
    if not (paths := plain_paths(job)):
        return None
    forms = ", ".join(f"{field}: pvc://CLAIM/{path.name}" for field, path in paths.items())
    return f"for this machine only: on a cluster, put what its paths name on a claim and write {forms}"


def volumes_with_this_machine(volumes: dict[str, Path]) -> dict[str, Path]:
    """The directories of claims, with the one that paths are on."""
    return {THIS_MACHINE: Path("/"), **volumes}
