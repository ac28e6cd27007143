"""A job's identity: the fields that shape the result of training, and a hash over them.

`jobs/<name>` of a workspace holds the identity of the spec that it belongs to, and another spec's job is refused there.
The identity is made from the wire form, under its own rules, so that neither a renamed field of the API nor a new
version of run.json changes it: a field of release 0.1.0 is always part of it, a later one only when it is not at its
default. The same spec thus has the same hash in every release, and either of two releases recognizes the folders of
the other.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_contract.run_config import RunConfig

MOST_SHOWN = 120
"""Characters of a value that are told where identities differ."""

_SHAPING: dict[str, set[str]] = {
    "model": {"source", "revision"},
    "dataset": {"source", "revision", "format", "trainSplit", "evalSplit", "evalFraction"},
    "adapter": {"method", "rank", "alpha", "dropout", "targetModules"},
    "quantization": {"scheme", "blockSize", "doubleQuantization"},
    "training": {
        "epochs",
        "maxSteps",
        "globalBatchTokens",
        "maxSequenceLength",
        "packing",
        "overlong",
        "learningRate",
        "schedule",
        "warmupRatio",
        "weightDecay",
        "maxGradNorm",
        "computeDtype",
        "seed",
    },
    "evaluation": {"everySteps", "requireImprovement"},
}
"""What release 0.1.0 wrote, whether at its default or not. Never changed."""

NOT_SHAPING: dict[str, set[str]] = {
    "model": {"credentialsSecret"},
    "dataset": {"credentialsSecret"},
    "adapter": {"initialAdapterCredentialsSecret"},
    "training": {"microBatchTokens", "gradientCheckpointing"},
    "evaluation": {"maxTokens", "prompts", "keepBest", "earlyStoppingPatience"},
}
"""Fields of these sections that never change a step, up to rounding. At which step training ends early, and which step
is published, is decided anew by each attempt."""


PUBLISHING: dict[str, set[str]] = {"evaluation": {"everySteps", "requireImprovement"}}
"""Fields of the identity that decide what becomes of an adapter, not what it is. They stay in the hash, which earlier
releases compare, and are passed over by `same_identity`."""

LENGTHS = ("epochs", "maxSteps")
"""Fields of training that say when it ends. Under a constant learning rate, past its warm-up, the steps before do not
depend on them."""


def identity_fields(run: RunConfig) -> dict[str, Any]:
    """The fields that shape the result, by section, as run.json spells them."""
    whole = run.model_dump(mode="json", by_alias=True)
    changed = run.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    fields = {
        section: {
            name: value
            for name, value in whole[section].items()
            if name in always
            or (name in changed.get(section, {}) and name not in NOT_SHAPING.get(section, ()))
        }
        for section, always in _SHAPING.items()
    }
    if several := changed.get("dataset", {}).get(
        "sources"
    ):  # what a later release adds to them is left out as well
        fields["dataset"]["sources"] = [
            {name: value for name, value in each.items() if name not in NOT_SHAPING["dataset"]}
            for each in several
        ]
    for source in (fields["model"], fields["dataset"], *fields["dataset"].get("sources", ())):
        if not (source["source"] or "").startswith("hf://"):
            source.pop("revision", None)
    return fields


def identity_hash(fields: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of identity_fields, in hexadecimal."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def identity(run: RunConfig) -> dict[str, Any]:
    """What identity.json holds: the hash, and the fields for those who want to know what differs."""
    fields = identity_fields(run)
    return {"hash": identity_hash(fields), "fields": fields}


def same_identity(stored: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether two identities are of the same training.

    Whether an adapter is published is decided anew by each attempt: a job whose adapter was not good enough may be
    started again with other terms, and goes on where it was.

    Args:
        stored: `identity` as a job folder holds it, of this release or another. KeyError when it has no hash.
        mine: `identity` of the run at hand.
    """
    return bool(stored["hash"] == mine["hash"]) or (
        _of_training(stored["fields"]) == _of_training(mine["fields"])
    )


def is_longer(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether two identity_fields differ in length alone, and the second is longer: more epochs, or more steps."""
    length = next((name for name in LENGTHS if old["training"].get(name) != new["training"].get(name)), None)
    if length is None:
        return False
    before, after = old["training"].get(length), new["training"].get(length)
    return (
        isinstance(before, int)
        and isinstance(after, int)
        and before < after
        and _of_training({**old, "training": {**old["training"], length: after}}) == _of_training(new)
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two identity_fields: `training.seed: 0, now 1`, the first five."""
    return ", ".join(list(_differences(_of_training(old), _of_training(new), ""))[:5])


def _of_training(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Identity fields without those of PUBLISHING."""
    return {
        section: {name: value for name, value in values.items() if name not in PUBLISHING.get(section, ())}
        for section, values in fields.items()
    }


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new:
        yield f"{_brief(path)}: {_brief(json.dumps(old))}, now {_brief(json.dumps(new))}"


def _brief(text: str) -> str:
    """The beginning of a text that may be a whole chat template."""
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(text):,} characters)"
