"""What docs/install.md gives to Argo CD and to Flux, run by interpreters of their languages."""

import re
from pathlib import Path
from typing import Any

import celpy
import lupa.lua51
import pytest
import yaml

from qlora_operator.api.names import ConditionType

PAGE = (Path(__file__).parents[2] / "docs" / "install.md").read_text()


def block(language: str, section: str) -> str:
    """The code of a section."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    (code,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return str(code)


def job(*holding: str, **status: Any) -> dict[str, Any]:
    """A job of whose conditions these hold."""
    known = [
        {"type": kind.value, "status": "True" if kind in holding else "False", "reason": "R", "message": ""}
        for kind in ConditionType
    ]
    told = {"observedGeneration": 2, "message": "so it is", "conditions": known, **status}
    return {"metadata": {"name": "demo", "generation": 2}, "status": told}


UNSEEN: dict[str, Any] = {"metadata": {"name": "demo", "generation": 1}}
STATES = {
    "no conditions": (job(conditions=[]), "Progressing", []),
    "starts": (job("Initialized"), "Progressing", []),
    "runs": (job("Initialized", "Running"), "Progressing", []),
    "restarts": (job("Initialized", "Restarting"), "Progressing", []),
    "held": (job("Suspended"), "Suspended", []),
    "done": (job("Initialized", "Complete", "Finished"), "Healthy", ["current"]),
    "failed": (job("Initialized", "Failed", "Finished"), "Degraded", ["failed"]),
}
"""A job, its health in Argo CD, and which of Flux' expressions hold."""
OUTDATED = {
    "just created": (UNSEEN, "Progressing", []),
    "changed since": (job("Complete", observedGeneration=1), "Progressing", []),
}
"""Flux looks at the generation by itself before it asks."""


def as_table(lua: Any, value: Any) -> Any:
    """JSON as Lua has it."""
    if isinstance(value, dict):
        return lua.table_from({key: as_table(lua, item) for key, item in value.items()})
    if isinstance(value, list):
        return lua.table_from([as_table(lua, item) for item in value])
    return value


@pytest.mark.parametrize("name", [*STATES, *OUTDATED])
def test_argo_cd(name: str) -> None:
    """Argo CD shows a job as what it is, and its message once the operator has seen it."""
    state, expected, _ = (STATES | OUTDATED)[name]
    lua = lupa.lua51.LuaRuntime()  # as gopher-lua, which Argo CD has
    health = lua.execute(f"local obj = ...\n{block('lua', 'Argo CD')}", as_table(lua, state))

    assert health["status"] == expected
    assert (health["message"] == "so it is") == (name in STATES)


@pytest.mark.parametrize("name", STATES)
def test_flux(name: str) -> None:
    """Flux waits for a job until it is complete or has failed."""
    state, _, expected = STATES[name]
    (check,) = yaml.safe_load(block("yaml", "Flux"))["spec"]["healthCheckExprs"]
    assert (check["apiVersion"], check["kind"]) == ("qlora.dev/v1alpha1", "QLoRAJob")

    def holds(expression: str) -> bool:
        environment = celpy.Environment()
        program = environment.program(environment.compile(expression))
        return bool(program.evaluate({key: celpy.json_to_cel(value) for key, value in state.items()}))

    assert [key for key in ("current", "failed") if holds(check[key])] == expected
