"""The base of every model of the contract and of the API, and what a model does not know of a document."""

import functools
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class ContractModel(BaseModel):
    """Closed, frozen, strictly typed; camelCase outside, snake_case inside.

    Strict, because a file says what it means: `"16"` is not a number. Frozen is shallow: lists and maps inside
    must not be changed either.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        validate_by_alias=True,
        validate_by_name=True,
    )


Unknown = list[tuple[str, Any]]
"""Dotted path, as users write it, and value of each field that a model does not have."""


def split_unknown(value: Any, model: type[BaseModel], path: str = "") -> tuple[Any, Unknown]:
    """A document without the fields that its model does not have, and these fields.

    Models in fields and in lists are looked into as well. What does not have the model's form is returned as it is: to
    validate is the caller's business. A model that ignores what it does not know has no unknown fields.

    Args:
        value: the document, or a list of such, as JSON holds it.
        model: what it is to be read as.
        path: where it stands in a larger document.
    """
    if isinstance(value, list):
        parts = [split_unknown(item, model, f"{path}[{index}]") for index, item in enumerate(value)]
        return [known for known, _ in parts], [path for _, unknown in parts for path in unknown]
    if not isinstance(value, dict) or model.model_config.get("extra") == "ignore":
        return value, []
    inner = _models_of_fields(model)
    kept: dict[str, Any] = {}
    unknown: Unknown = []
    for name, item in value.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in inner:
            unknown.append((where, item))
        elif (inner_model := inner[name]) is None:
            kept[name] = item
        else:
            kept[name], deeper = split_unknown(item, inner_model, where)
            unknown += deeper
    return kept, unknown


@functools.cache
def _models_of_fields(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Alias of each field -> the model that it is or contains; None for plain values."""
    return {str(info.alias): _model_in(info.annotation) for info in model.model_fields.values()}


def _model_in(form: Any) -> type[BaseModel] | None:
    if isinstance(form, type) and issubclass(form, BaseModel):
        return form
    return next((model for part in get_args(form) if (model := _model_in(part)) is not None), None)
