"""`--set`."""

from typing import Any

import pytest

from qlora_operator.cli.settings import Setting, with_settings
from qlora_operator.errors import CommandError


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("training.learningRate=1e-4", {"training": {"learningRate": 1e-4, "epochs": 1}}),
        ("spec.training.seed=7", {"training": {"seed": 7, "epochs": 1}}),
        ("training.maxSteps=9", {"training": {"maxSteps": 9}}),
        ("training.epochs=", {"training": {}}),
        ("adapter.targetModules=[q_proj, v_proj]", {"training": {"epochs": 1},
                                                    "adapter": {"targetModules": ["q_proj", "v_proj"]}}),
        ("model.revision=12345678", {"training": {"epochs": 1}, "model": {"revision": "12345678"}}),
        ("dataset.chatTemplateKwargs.enable_thinking=false",
         {"training": {"epochs": 1}, "dataset": {"chatTemplateKwargs": {"enable_thinking": "false"}}}),
        ("suspend=true", {"training": {"epochs": 1}, "suspend": True}),
    ],
)  # fmt: skip
def test_a_field_is_set_with_the_type_that_yaml_gives_it(text: str, spec: dict[str, Any]) -> None:
    """Text stays text where the field is one; of epochs and maxSteps the other goes."""
    document = {"spec": {"training": {"epochs": 1}}}

    assert with_settings(document, [Setting(text)])["spec"] == spec
    assert document == {"spec": {"training": {"epochs": 1}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training", "must be FIELD=VALUE"),
        ("learningRate=1", "did you mean training.learningRate?"),
        ("training.learning_rat=1", "did you mean learningRate?"),
        ("everySteps=1", "did you mean one of evaluation.everySteps, checkpoint.everySteps?"),
        ("lr=1", "lr: no such field; here it is training.learningRate"),
        ("training.lr=1", "here it is training.learningRate"),
        ("batch-size=4", "here it is training.globalBatchTokens (a whole step over all ranks, in tokens)"),
        ("optim=sgd", "the optimizer is AdamW, and there is no other"),
        ("metadata.name=x", "only fields of spec can be set; change metadata in the file"),
        ("workspace.path=x", "workspace has no fields"),
        ("adapter.targetModules=[q_proj", "the value is not YAML"),
    ],
)
def test_what_is_no_field_or_no_value_is_told(text: str, message: str) -> None:
    """With what was perhaps meant."""
    with pytest.raises(CommandError, match="--set") as refused:
        Setting(text)

    assert message in str(refused.value)
    assert refused.value.code == 2
