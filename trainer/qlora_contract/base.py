"""The base of every model of the contract and of the API."""

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class ContractModel(BaseModel):
    """Closed, frozen, strictly typed; camelCase outside, snake_case inside.

    Strict, because a file says what it means: `"16"` is no number. Frozen is
    shallow: lists and maps inside must not be changed either.
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
