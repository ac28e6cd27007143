"""run.json, read by everything of the trainer that starts: the launcher, each rank, a transfer, the planner.

Torch is not imported here: the launcher sets thread counts before that.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_contract.base import split_unknown
from qlora_contract.exit_codes import ExitCode
from qlora_contract.files import read_json
from qlora_contract.run_config import RUN_CONFIG_VERSIONS, RunConfig

SAYS_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})


class RunFileError(Exception):
    """run.json cannot be used; `code` is what the process exits with."""

    def __init__(self, cause: str, code: ExitCode = ExitCode.INVALID_CONFIGURATION) -> None:
        super().__init__(cause)
        self.code = code


def load_run(path: Path) -> RunConfig:
    """The run in a file. It may have been written by an operator of another release.

    An unknown field that holds null, false, 0, "", [] or {} is passed over: whoever adds a field with any other default
    must raise the version. One that holds anything else asks for something that this trainer cannot do.

    Raises:
        RunFileError: the file is missing or malformed, is of a version that this trainer does not read, or has a field
            that it does not know.
    """
    try:
        document = read_json(path)
        version = document["version"]
    except OSError as error:
        raise RunFileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunFileError(f"{path} is not a JSON object with a version: {error!r}") from error
    reads = " and ".join(map(str, RUN_CONFIG_VERSIONS))
    if version not in RUN_CONFIG_VERSIONS:
        raise RunFileError(
            f"{path} has version {version!r} and this trainer reads versions {reads}: "
            "use a trainer image of the operator's release"
        )
    known, unknown = split_unknown(document, RunConfig)
    if newer := [name for name, value in unknown if value not in SAYS_NOTHING]:
        raise RunFileError(
            f"{path} sets {', '.join(newer)}, which this trainer does not know, although it reads versions {reads}: "
            "use a trainer image of the operator's release"
        )
    try:
        return RunConfig.model_validate_json(json.dumps(known))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the object as a whole"
        raise RunFileError(f"{path} is malformed at {where}: {first['msg']}") from error


def with_rank_counts(run: RunConfig, counts: Sequence[int]) -> RunConfig:
    """The run once each pod's number of ranks is known.

    Args:
        run: as read from run.json.
        counts: ranks of each pod, as the launchers agreed on.
    """
    return run.model_copy(update={"layout": run.layout.with_rank_counts(counts)})
