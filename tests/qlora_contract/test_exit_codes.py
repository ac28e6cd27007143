"""The table of exit codes, and which of several names the cause."""

import ast
import inspect
import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_contract.exit_codes import (
    COLLATERAL,
    INFRASTRUCTURE,
    PERMANENT,
    RETRYABLE,
    ExitCode,
    FailureKind,
    dominant_exit_code,
)

CODES = st.one_of(st.sampled_from(list(ExitCode)), st.integers(-64, -1), st.integers(0, 255))


def test_the_numbers_are_the_contract() -> None:
    """A code's number never changes, since operators and trainers of other releases know it."""
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "UNEXPECTED": 1,
        "INVALID_CONFIGURATION": 10,
        "INVALID_DATA": 11,
        "MODEL_UNUSABLE": 12,
        "DIVERGED": 13,
        "STORAGE_FULL": 14,
        "OUT_OF_MEMORY": 15,
        "NO_IMPROVEMENT": 16,
        "TRANSFER_REFUSED": 17,
        "RENDEZVOUS_FAILED": 30,
        "STALLED": 31,
        "TRANSFER_FAILED": 32,
        "ADAPTERS_DIFFER": 33,
        "LOST_PEER": 40,
        "COLLECTIVE_TIMEOUT": 41,
        "TERMINATED": 50,
        "ISA_BELOW_TIER": 51,
    }


def test_every_code_has_one_kind() -> None:
    """Every code but DONE is in exactly one of the kinds that decide about a retry."""
    kinds = [PERMANENT, RETRYABLE, COLLATERAL, INFRASTRUCTURE]

    assert set().union(*kinds) == set(ExitCode) - {ExitCode.DONE}
    assert sum(len(kind) for kind in kinds) == len(ExitCode) - 1


@pytest.mark.parametrize("code", ExitCode, ids=lambda code: code.name)
def test_every_code_is_documented(code: ExitCode) -> None:
    """The reference has a row for each: a kind, a sentence, and a reason as conditions write it."""
    assert isinstance(code.kind, FailureKind)
    assert (code.kind == FailureKind.NONE) == (code == ExitCode.DONE)
    assert re.fullmatch(r"[A-Z].*\.", code.meaning)
    assert re.fullmatch(r"([A-Z][a-z]+)+", code.reason)


def test_every_kind_is_documented() -> None:
    """The docstring below each kind says what it costs; the reference quotes it."""
    tree = ast.parse(inspect.getsource(FailureKind))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    documented = [
        ast.unparse(before.targets[0])
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.Assign) and isinstance(after, ast.Expr)
    ]

    assert documented == [kind.name for kind in FailureKind]


def test_a_reason_is_the_name_unless_the_table_says_otherwise() -> None:
    """Conditions say InvalidData for INVALID_DATA; both codes that name a lost peer have one reason."""
    assert ExitCode.INVALID_DATA.reason == "InvalidData"
    assert ExitCode.LOST_PEER.reason == ExitCode.COLLECTIVE_TIMEOUT.reason == "PeerLost"


def test_a_code_is_an_integer() -> None:
    """A row of the table is still the number that a process exits with and that JSON holds."""
    assert json.dumps([ExitCode.DIVERGED]) == "[13]"
    assert ExitCode(13) is ExitCode.DIVERGED


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        pytest.param([], 0, id="no ranks"),
        pytest.param([0, 0], 0, id="done"),
        pytest.param([40, 13], 13, id="permanent over collateral"),
        pytest.param([1, 13], 13, id="permanent over unexpected"),
        pytest.param([-9, 15], 15, id="permanent over a signal"),
        pytest.param([-9, 31], 31, id="retryable over a signal"),
        pytest.param([50, -9], 137, id="a signal over infrastructure"),
        pytest.param([40, 50], 50, id="infrastructure over collateral"),
        pytest.param([0, 41], 41, id="collateral over done"),
        pytest.param([10, 11], 10, id="the first of a kind"),
        pytest.param([-15], 143, id="as a shell has it"),
        pytest.param([137, 40], 137, id="already as a shell has it"),
        pytest.param([0, 3], 3, id="a code of nobody's"),
    ],
)
def test_the_code_that_names_the_cause_best_wins(codes: list[int], code: int) -> None:
    """Permanent, then retryable, then signals, then infrastructure, then collateral, then done."""
    assert dominant_exit_code(codes) == code


def test_a_transfer_that_is_refused_is_not_tried_again() -> None:
    """The same request is refused again; what broke off may work the next time."""
    assert ExitCode.TRANSFER_REFUSED in PERMANENT
    assert ExitCode.TRANSFER_FAILED in RETRYABLE


@given(st.lists(CODES))
def test_failure_is_never_lost(codes: list[int]) -> None:
    """The pod is done only when every rank is, and its code is one of theirs that a process can have."""
    dominant = dominant_exit_code(codes)

    assert (dominant == 0) == all(code == 0 for code in codes)
    assert dominant in {0} | {code if code >= 0 else 128 - code for code in codes}


@given(st.lists(CODES, min_size=1))
def test_a_rank_more_that_is_done_changes_nothing(codes: list[int]) -> None:
    """Ranks that are done do not hide what the others died of."""
    assert dominant_exit_code([0, *codes]) == dominant_exit_code(codes)
