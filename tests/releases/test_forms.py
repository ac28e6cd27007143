"""What users write, what ranks read, and what a folder is marked with: the same in this release and the one before."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from qlora_contract.identity import identity_fields, identity_hash, same_identity
from qlora_contract.progress import ProgressReport, TerminationReport
from qlora_contract.run_config import ResolvedRevisions, RunConfig
from qlora_operator.api.loader import parse_api_object
from qlora_operator.api.quantity import parse_memory
from qlora_operator.api.run_config import config_hash, to_run_config
from qlora_operator.api.v1alpha1 import topology_hash
from qlora_trainer.run_file import load_run

Specs = SearchStrategy[dict[str, Any]]
Document = Callable[..., dict[str, Any]]
BEGUN_BY_OLD = {"provenance": {"image": "old", "runConfigVersion": 1}}
settings = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def leaves(fields: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of everything that a spec sets."""
    if isinstance(fields, dict):
        for name, value in fields.items():
            yield from leaves(value, (*path, name))
    else:
        yield path, fields


def at(fields: Any, path: tuple[str, ...]) -> Any:
    """The value at a path."""
    for name in path:
        fields = fields[name]
    return fields


@settings
@given(data=st.data())
def test_every_field_that_ranks_need_arrives(
    specs: Specs, document: Document, tmp_path: Path, data: st.DataObject
) -> None:
    """Each value that a user sets is read from run.json by the trainer; what is unset has its default there."""
    spec = data.draw(specs)
    job, ignored = parse_api_object(document(spec))
    file = tmp_path / "run.json"
    file.write_text(to_run_config(job, uid="0f-1", attempt=3, isa="avx2").to_json())
    read = load_run(file).model_dump(mode="json", by_alias=True)

    assert ignored == []
    for path, value in leaves(spec):
        if path[-1] == "sources":  # a list of objects, whose defaults are set as well: below
            continue
        if path == ("topology", "minPods"):  # the operator's alone
            continue
        there = ("layout", *path[1:]) if path[0] == "topology" else path
        wanted = parse_memory(value) if path[-1] == "memoryPerRank" else value
        assert at(read, there) == wanted
    unset = job.spec.model_dump(mode="json", by_alias=True)
    for section in ("dataset", "adapter", "training", "evaluation", "checkpoint", "distributed"):
        assert read[section] == unset[section]


@settings
@given(data=st.data())
def test_an_old_trainer_reads_what_a_new_operator_writes_for_it(
    old: SimpleNamespace, old_specs: Specs, document: Document, data: st.DataObject
) -> None:
    """Its strict classes accept it, and make of it what the old operator would have written."""
    spec = data.draw(old_specs)
    fetched = {"model": "c" * 40}
    job, _ = parse_api_object(document(spec, BEGUN_BY_OLD))
    new = to_run_config(
        job, uid="0f-1", attempt=3, isa="avx2", stage="fetch", fetched=ResolvedRevisions(**fetched)
    )
    before = old.run_config.run_config(
        old.types.QLoRAJob.model_validate(document(spec)),
        uid="0f-1", attempt=3, isa="avx2", stage="fetch", fetched=old.run.Fetched(**fetched),
    )  # fmt: skip

    for text in (new.to_json(), new.to_json(indent=None)):
        assert old.run.RunConfig.model_validate_json(text) == before


@settings
@given(data=st.data())
def test_a_new_trainer_reads_what_an_old_operator_writes(
    old: SimpleNamespace, old_specs: Specs, document: Document, tmp_path: Path, data: st.DataObject
) -> None:
    """An image of this release runs the jobs of an operator that was not upgraded, or was rolled back."""
    spec = data.draw(old_specs)
    run = old.run_config.run_config(
        old.types.QLoRAJob.model_validate(document(spec)), uid="0f-1", attempt=3, isa="avx2"
    )
    job, _ = parse_api_object(document(spec, BEGUN_BY_OLD))
    wanted = to_run_config(job, uid="0f-1", attempt=3, isa="avx2")

    for text in (run.to_json(), run.model_dump_json(by_alias=True)):
        (tmp_path / "run.json").write_text(text)
        assert load_run(tmp_path / "run.json") == wanted


@settings
@given(data=st.data())
def test_a_job_has_one_identity_in_both_releases(
    old: SimpleNamespace, old_specs: Specs, document: Document, data: st.DataObject
) -> None:
    """A folder, a status and an AttemptJob that either release has marked are recognized by the other."""
    spec = data.draw(old_specs)
    job, _ = parse_api_object(document(spec))
    before = old.types.QLoRAJob.model_validate(document(spec))
    run = to_run_config(job, uid="0f-1", attempt=0, isa="avx2")
    old_fields = old.run.run_shaping_fields(old.run_config.run_config(before, uid="u", attempt=9, isa="avx2"))
    old_mark = json.loads(json.dumps({"hash": old.run.config_hash(old_fields), "fields": old_fields}))

    fields = identity_fields(run)
    assert fields == old_mark["fields"]
    assert identity_hash(fields) == old_mark["hash"]
    assert same_identity(old_mark, {"hash": identity_hash(fields), "fields": fields})
    assert config_hash(job) == old.decision._hash(before.spec)
    assert topology_hash(job.spec) == old.types.held_fields(before.spec)


PROGRESS = ProgressReport(
    job_uid="0f-1",
    attempt=2,
    stage="Training",
    step=3,
    total_steps=9,
    epoch=0.5,
    updated_time="2026-01-01T00:00:00Z",
)
TERMINATION = TerminationReport(
    exit_code=13, reason="DIVERGED", cause="the loss is NaN", step=7, world_size=2
)


def test_both_releases_read_each_others_reports(old: SimpleNamespace) -> None:
    """Progress, and the cause of an end, reach an operator of the other release."""
    for report, before in (
        (PROGRESS, old.progress.ProgressReport),
        (TERMINATION, old.progress.TerminationReport),
    ):
        for options in ({}, {"exclude_none": True}):
            text = report.model_dump_json(by_alias=True, **options)
            read = before.model_validate_json(text, extra="ignore")  # as its operator reads it
            theirs = read.model_dump()
            assert theirs == {name: value for name, value in report.model_dump().items() if name in theirs}
            assert type(report).model_validate_json(read.model_dump_json(by_alias=True)) == report


def test_a_run_of_this_release_is_refused_by_an_old_trainer_for_its_version(old: SimpleNamespace) -> None:
    """What a job with an old image must not get is told by its version alone."""
    assert old.run.RUN_CONFIG_VERSION == 1
    assert RunConfig.model_fields["version"].default == 2
