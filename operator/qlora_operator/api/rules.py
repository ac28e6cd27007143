"""Rules between fields, each in two languages side by side: CEL for the API server, Python for everyone else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from qlora_contract.base import ContractModel


@dataclass(frozen=True)
class Rule:
    """A condition that an object of the API must meet.

    `cel` and `holds` must agree on every object; a test evaluates both.
    """

    cel: str
    holds: Callable[[Any], bool]
    message: str
    field: tuple[str, ...] = ()
    """Where the fault lies, from the object that has the rule; empty for the object itself."""

    def as_validation(self) -> dict[str, str]:
        """The rule as an item of `x-kubernetes-validations`."""
        validation = {"rule": self.cel, "message": self.message}
        if self.field:
            validation["fieldPath"] = "." + ".".join(self.field)
        return validation


def _add_validations(schema: dict[str, Any], model: type["ApiModel"]) -> None:
    if model.rules:
        schema["x-kubernetes-validations"] = [rule.as_validation() for rule in model.rules]


class ApiModel(ContractModel):
    """A model of the API, with the rules between its fields."""

    model_config = ConfigDict(json_schema_extra=_add_validations)

    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        broken = [
            InitErrorDetails(type=PydanticCustomError("rule", rule.message), loc=rule.field, input=None)
            for rule in self.rules
            if not rule.holds(self)
        ]
        if broken:
            # A ValidationError, unlike a ValueError, keeps where each fault lies.
            raise ValidationError.from_exception_data(type(self).__name__, broken)
        return self
