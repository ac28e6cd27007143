"""What a job may say, and what it means where it says nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import OMIT
from qlora_contract.run_config import ISA_TIERS, RunConfig
from qlora_operator.api import names
from qlora_operator.api.loader import load_jobs, parse_job
from qlora_operator.api.v1alpha1 import (
    MUTABLE,
    MUTABLE_WHILE_SUSPENDED,
    OPERATOR_ONLY,
    QLoRAJob,
    QLoRAJobSpec,
    ignored_by_run,
    topology_hash,
)
from qlora_operator.errors import InvalidJobError

PREFIX: dict[str, Any] = {"method": "prefix-tuning", "numVirtualTokens": 8}
SAMPLES = Path(__file__).parents[3] / "manifests/samples"

DEFAULTS = {
    "adapter": {
        "method": "lora",
        "rank": 16,
        "alpha": 32,
        "dropout": 0,
        "targetModules": ["all-linear"],
        "rslora": False,
        "rankPattern": {},
        "alphaPattern": {},
        "loraPlusRatio": 1,
        "initialAdapter": None,
        "initialAdapterRevision": None,
        "initialAdapterCredentialsSecret": None,
        "numVirtualTokens": None,
        "promptInit": "random",
        "promptInitText": None,
        "prefixProjection": False,
        "encoderHiddenSize": None,
    },
    "quantization": {"scheme": "nf4", "blockSize": 64, "doubleQuantization": True},
    "training": {
        "epochs": 3,
        "maxSteps": None,
        "globalBatchTokens": 8192,
        "microBatchTokens": None,
        "maxSequenceLength": 1024,
        "packing": True,
        "overlong": "truncate",
        "learningRate": 2e-4,
        "schedule": "cosine",
        "warmupRatio": 0.03,
        "weightDecay": 0,
        "maxGradNorm": 1.0,
        "computeDtype": "auto",
        "gradientCheckpointing": "auto",
        "seed": 0,
    },
    "evaluation": {
        "everySteps": None,
        "maxTokens": 65536,
        "prompts": 3,
        "requireImprovement": True,
        "keepBest": False,
        "earlyStoppingPatience": None,
    },
    "checkpoint": {"everySteps": None, "everySeconds": 600, "keep": 2},
    "topology": {
        "pods": 1,
        "minPods": None,
        "ranksPerPod": 1,
        "cpusPerRank": 4,
        "memoryPerRank": "2Gi",
        "pinning": "strict",
        "memoryTier": "any",
    },
    "isa": {"allowed": ["amx_bf16", "avx512_bf16", "avx512", "avx2"], "stepDownSeconds": 300},
    "distributed": {"backend": "gloo", "timeoutSeconds": 300, "rendezvousTimeoutSeconds": 1800},
    "scheduling": {"nodeSelector": {}, "tolerations": [], "priorityClassName": None, "queueName": None},
    "schedule": None,
    "image": None,
    "suspend": False,
    "managedBy": None,
    "ttlSecondsAfterFinished": None,
    "activeDeadlineSeconds": None,
    "backoffLimit": 3,
    "infrastructureBackoffLimit": 20,
    "pendingDeadlineSeconds": None,
    "progressDeadlineSeconds": 1800,
    "terminationGracePeriodSeconds": 300,
    "workspace": "pvc://team-data/qlora",
    "model": {
        "source": "pvc://team-data/models/SmolLM2-135M-Instruct",
        "revision": "main",
        "credentialsSecret": None,
    },
    "tracking": {"mlflow": None},
    "output": {
        "destination": None,
        "credentialsSecret": None,
        "formats": ["adapter"],
        "ggufTypes": ["q8_0"],
    },
    "dataset": {
        "source": "pvc://team-data/docs.jsonl",
        "sources": None,
        "revision": "main",
        "credentialsSecret": None,
        "format": "auto",
        "columns": dict.fromkeys(
            [
                "messages",
                "prompt",
                "completion",
                "instruction",
                "input",
                "output",
                "system",
                "history",
                "tools",
                "text",
            ]
        ),
        "trainSplit": "train",
        "evalSplit": None,
        "evalFraction": 0.05,
        "chatTemplate": None,
        "chatTemplateKwargs": {},
        "train": "all",
        "onBadRecord": "fail",
        "maxBadShare": 0.01,
    },
}
"""The documented defaults, besides what the smallest job says itself."""


def test_what_a_job_leaves_out_has_the_documented_default(minimal: dict[str, Any]) -> None:
    """The smallest job means exactly what the design says."""
    job = parse_job(minimal)

    assert job is not None
    assert job.spec.model_dump(by_alias=True) == DEFAULTS


BAD = {
    "no apiVersion": ({"apiVersion": OMIT}, "apiVersion", "is required: qlora.dev/v1alpha1"),
    "other version": ({"apiVersion": "qlora.dev/v1"}, "apiVersion", "must be qlora.dev/v1alpha1"),
    "no kind": ({"kind": OMIT}, "kind", "is required: QLoRAJob"),
    "no metadata": ({"metadata": OMIT}, "metadata", "is required"),
    "metadata is a string": ({"metadata": "docs"}, "metadata", "is the string 'docs'; it must be a map"),
    "no name": ({"metadata.name": OMIT}, "metadata.name", "is required: a name of lower-case"),
    "name begins with a digit": ({"metadata.name": "7b"}, "metadata.name", "begins with a letter"),
    "name in capitals": ({"metadata.name": "Docs"}, "metadata.name", "lower-case letters"),
    "name ends with a hyphen": ({"metadata.name": "docs-"}, "metadata.name", "does not end with a hyphen"),
    "name has a dot": ({"metadata.name": "docs.v1"}, "metadata.name", "letters, digits and hyphens"),
    "name of 51 characters": ({"metadata.name": "a" * 51}, "metadata.name", "at most 50 characters"),
    "name is a number": ({"metadata.name": 7}, "metadata.name", "is the number 7"),
    "label is a number": ({"metadata.labels": {"a": 1}}, "metadata.labels.a", "must be a string"),
    "misspelt labels": ({"metadata.lables": {}}, "metadata.lables", "did you mean labels?"),
    "no spec": ({"spec": OMIT}, "spec", "is required: a map with workspace, model"),
    "spec is null": ({"spec": None}, "spec", "is required"),
    "spec is a list": ({"spec": []}, "spec", "is a list; it must be a map"),
    "misspelt spec": ({"specs": {}}, "specs", "did you mean spec?"),
    "no workspace": ({"spec.workspace": OMIT}, "spec.workspace", "is required: pvc://claim/path"),
    "workspace is a path": ({"spec.workspace": "/data"}, "spec.workspace", "must be pvc://claim/path"),
    "workspace leaves its claim": (
        {"spec.workspace": "pvc://team-data/../other"},
        "spec.workspace",
        "must stay within its claim",
    ),
    "workspace with a line break": ({"spec.workspace": "pvc://c/a\nb"}, "spec.workspace", "pvc://claim/path"),
    "workspace with a null character": (
        {"spec.workspace": "pvc://c/\0"},
        "spec.workspace",
        "pvc://claim/path",
    ),
    "workspace ends upwards": (
        {"spec.workspace": "pvc://team-data/a/.."},
        "spec.workspace",
        "not contain `..`",
    ),
    "workspace is too long": ({"spec.workspace": "pvc://c/" + "a" * 512}, "spec.workspace", "at most 512"),
    "no model": ({"spec.model": OMIT}, "spec.model", "is required: a map with source"),
    "model is a string": ({"spec.model": "pvc://c/m"}, "spec.model", "must be a map with source"),
    "no model source": ({"spec.model": {}}, "spec.model.source", "is required"),
    "model without an organisation": (
        {"spec.model.source": "hf://gpt2"},
        "spec.model.source",
        "must be pvc://claim/path, hf://org/name or s3://bucket/path",
    ),
    "a file of the Hub as model": (
        {"spec.model.source": "hf://org/name/model.safetensors"},
        "spec.model.source",
        "hf://org/name",
    ),
    "a dataset as model": (
        {"spec.model.source": "hf://datasets/org/name"},
        "spec.model.source",
        "hf://org/name",
    ),
    "model by https": (
        {"spec.model.source": "https://hub.example/org/name"},
        "spec.model.source",
        "must be pvc://claim/path, hf://org/name or s3://bucket/path",
    ),
    "model in a registry": (
        {"spec.model.source": "oci://registry.example/team/model:v1"},
        "spec.model.source",
        "must be pvc://claim/path, hf://org/name or s3://bucket/path",
    ),
    "data in a registry": (
        {"spec.dataset": {"source": "oci://registry.example/team/data:v1"}},
        "spec.dataset.source",
        "must be pvc://claim/path",
    ),
    "an initial adapter in a registry": (
        {"spec.adapter": {"initialAdapter": "oci://registry.example/team/adapter:v1"}},
        "spec.adapter.initialAdapter",
        "must be pvc://claim/path",
    ),
    "model of a file system": ({"spec.model.source": "file:///etc"}, "spec.model.source", "pvc://claim/path"),
    "model of a bucket in capitals": (
        {"spec.model.source": "s3://Team/m"},
        "spec.model.source",
        "s3://bucket",
    ),
    "model of a bucket with credentials": (
        {"spec.model.source": "s3://key:secret@bucket/m"},
        "spec.model.source",
        "s3://bucket/path",
    ),
    "model source leaves its claim": (
        {"spec.model.source": "pvc://c/../m"},
        "spec.model.source",
        "must stay within its claim",
    ),
    "model source leaves its bucket": (
        {"spec.model.source": "s3://bucket/a/../../b"},
        "spec.model.source",
        "must stay within its claim",
    ),
    "revision of a model on a claim": (
        {"spec.model.revision": "v1"},
        "spec.model.revision",
        "requires an hf:// source",
    ),
    "revision of a model in a bucket": (
        {"spec.model": {"source": "s3://bucket/m", "revision": "v1"}},
        "spec.model.revision",
        "requires an hf:// source",
    ),
    "revision with a space": (
        {"spec.model": {"source": "hf://org/name", "revision": "a b"}},
        "spec.model.revision",
        "must be a branch, tag or commit of the Hub",
    ),
    "revision that climbs": (
        {"spec.model": {"source": "hf://org/name", "revision": "../main"}},
        "spec.model.revision",
        "must be a branch, tag or commit of the Hub",
    ),
    "revision of 129 characters": (
        {"spec.model": {"source": "hf://org/name", "revision": "a" * 129}},
        "spec.model.revision",
        "at most 128 characters",
    ),
    "credentials for a model on a claim": (
        {"spec.model.credentialsSecret": "hub"},
        "spec.model.credentialsSecret",
        "requires an hf:// or s3:// source",
    ),
    "credentials of another namespace": (
        {"spec.model": {"source": "hf://org/name", "credentialsSecret": "other/hub"}},
        "spec.model.credentialsSecret",
        "must be the name of a Secret",
    ),
    "credentials in place of their Secret": (
        {"spec.model": {"source": "hf://org/name", "credentialsSecret": {"token": "hf_x"}}},
        "spec.model.credentialsSecret",
        "is a map; it must be the name of a Secret",
    ),
    "dataset of the Hub without its word": (
        {"spec.dataset.source": "hf://org/name"},
        "spec.dataset.source",
        "must be pvc://claim/path, hf://datasets/org/name/path, s3://bucket/path, or https://host/path",
    ),
    "dataset source leaves its repository": (
        {"spec.dataset.source": "hf://datasets/org/name/../../x"},
        "spec.dataset.source",
        "must stay within its claim",
    ),
    "revision of a dataset on a claim": (
        {"spec.dataset.revision": "v1"},
        "spec.dataset.revision",
        "requires an hf:// source",
    ),
    "credentials for a dataset on a claim": (
        {"spec.dataset.credentialsSecret": "hub"},
        "spec.dataset.credentialsSecret",
        "requires an hf:// or s3:// source",
    ),
    "one source and several": (
        {"spec.dataset.sources": [{"source": "pvc://c/d"}]},
        "spec.dataset",
        "exactly one of source and sources must be given",
    ),
    "no data": (
        {"spec.dataset": {"evalFraction": 0.1}},
        "spec.dataset",
        "exactly one of source and sources must be given",
    ),
    "a format for all of several sources": (
        {"spec.dataset": {"sources": [{"source": "pvc://c/d"}], "format": "chat"}},
        "spec.dataset",
        "must be given for each of them",
    ),
    "a column for all of several sources": (
        {"spec.dataset": {"sources": [{"source": "pvc://c/d"}], "columns": {"text": "body"}}},
        "spec.dataset",
        "must be given for each of them",
    ),
    "a source that is never seen": (
        {"spec.dataset": {"sources": [{"source": "pvc://c/d", "weight": 0}]}},
        "spec.dataset.sources[0].weight",
        "it must be a number above 0.0, at most 100.0",
    ),
    "one of several sources leaves its claim": (
        {"spec.dataset": {"sources": [{"source": "pvc://c/d"}, {"source": "pvc://c/../d"}]}},
        "spec.dataset.sources[1].source",
        "must stay within its claim",
    ),
    "revision of one of several sources on a claim": (
        {"spec.dataset": {"sources": [{"source": "pvc://c/d", "revision": "v1"}]}},
        "spec.dataset.sources[0].revision",
        "requires an hf:// source",
    ),
    "credentials for one of several sources on a claim": (
        {"spec.dataset": {"sources": [{"source": "pvc://c/d", "credentialsSecret": "hub"}]}},
        "spec.dataset.sources[0].credentialsSecret",
        "requires an hf:// or s3:// source",
    ),
    "a tracking server with a password": (
        {"spec.tracking": {"mlflow": {"uri": "http://user:word@mlflow:5000"}}},
        "spec.tracking.mlflow.uri",
        "must be a server's address such as http://mlflow.tracking.svc:5000",
    ),
    "a tracking server without a scheme": (
        {"spec.tracking": {"mlflow": {"uri": "mlflow.tracking.svc:5000"}}},
        "spec.tracking.mlflow.uri",
        "must be a server's address such as http://mlflow.tracking.svc:5000",
    ),
    "a tracking server without an address": (
        {"spec.tracking": {"mlflow": {"experiment": "docs"}}},
        "spec.tracking.mlflow.uri",
        "is required",
    ),
    "destination on a claim": (
        {"spec.output": {"destination": "pvc://c/out"}},
        "spec.output.destination",
        "must be hf://org/name, s3://bucket/path or oci://registry/name:tag",
    ),
    "destination among the datasets": (
        {"spec.output": {"destination": "hf://datasets/org/name"}},
        "spec.output.destination",
        "must be hf://org/name, s3://bucket/path or oci://registry/name:tag",
    ),
    "destination leaves its bucket": (
        {"spec.output": {"destination": "s3://bucket/.."}},
        "spec.output.destination",
        "must stay within its bucket",
    ),
    "credentials without a destination": (
        {"spec.output": {"credentialsSecret": "writer"}},
        "spec.output.credentialsSecret",
        "requires a destination",
    ),
    "misspelt destination": (
        {"spec.output": {"destinaton": "s3://bucket"}},
        "spec.output.destinaton",
        "did you mean destination?",
    ),
    "dataset source leaves its claim": (
        {"spec.dataset.source": "pvc://c/a/../../b"},
        "spec.dataset.source",
        "must stay within its claim",
    ),
    "dataset of unknown format": (
        {"spec.dataset.format": "dpo"},
        "spec.dataset.format",
        "is the string 'dpo'; it must be one of auto, chat, prompt-completion, alpaca, text",
    ),
    "columns that no format has": (
        {"spec.dataset.columns": {"question": "q"}},
        "spec.dataset.columns.question",
        "no such field; there are messages, prompt, completion",
    ),
    "a column without a name": (
        {"spec.dataset.columns": {"prompt": ""}},
        "spec.dataset.columns.prompt",
        "of 1 to 128 characters",
    ),
    "every record may be bad, and more": (
        {"spec.dataset.maxBadShare": 1.5},
        "spec.dataset.maxBadShare",
        "to 1",
    ),
    "misspelt dataset field": (
        {"spec.dataset.evalFractoin": 0.1},
        "spec.dataset.evalFractoin",
        "did you mean evalFraction?",
    ),
    "eval fraction above a half": ({"spec.dataset.evalFraction": 0.6}, "spec.dataset.evalFraction", "to 0.5"),
    "chat template is a name": (
        {"spec.dataset.chatTemplate": "chatml"},
        "spec.dataset.chatTemplate",
        "is the string 'chatml'; it must be a string",
    ),
    "variable of a template is a boolean": (
        {"spec.dataset.chatTemplateKwargs": {"enable_thinking": False}},
        "spec.dataset.chatTemplateKwargs.enable_thinking",
        "is the boolean false; it must be a string",
    ),
    "train on the first turn": (
        {"spec.dataset.train": "firstTurn"},
        "spec.dataset.train",
        "must be one of all, lastTurn",
    ),
    "split is a path": ({"spec.dataset.trainSplit": "../x"}, "spec.dataset.trainSplit", "that matches"),
    "rank 0": ({"spec.adapter.rank": 0}, "spec.adapter.rank", "must be an integer from 1 to 512"),
    "rank is a string": ({"spec.adapter.rank": "16"}, "spec.adapter.rank", "is the string '16'"),
    "rank is a fraction": ({"spec.adapter.rank": 1.5}, "spec.adapter.rank", "is the number 1.5"),
    "alpha 0": ({"spec.adapter.alpha": 0}, "spec.adapter.alpha", "must be a number above 0, at most 4096"),
    "dropout 1": ({"spec.adapter.dropout": 1}, "spec.adapter.dropout", "from 0.0, below 1.0"),
    "prefix tuning without tokens": (
        {"spec.adapter": {"method": "prefix-tuning"}},
        "spec.adapter.numVirtualTokens",
        "need a number of virtual tokens",
    ),
    "LoRA with virtual tokens": (
        {"spec.adapter.numVirtualTokens": 8},
        "spec.adapter.numVirtualTokens",
        "lora has none",
    ),
    **{
        f"prompt tuning with LoRA's {field}": (
            {"spec.adapter": {"method": "prompt-tuning", "numVirtualTokens": 8, field: value}},
            f"spec.adapter.{field}",
            "is a setting of method lora",
        )
        for field, value in {
            "rank": 8,
            "alpha": 8,
            "dropout": 0.1,
            "targetModules": ["q_proj"],
            "rslora": True,
            "rankPattern": {"q_proj": 2},
            "alphaPattern": {"q_proj": 2},
            "loraPlusRatio": 4,
        }.items()
    },
    "an MLP that starts as a text": (
        {
            "spec.adapter": {
                **PREFIX,
                "prefixProjection": True,
                "promptInit": "text",
                "promptInitText": "Answer.",
            }
        },
        "spec.adapter.promptInit",
        "not those that prefixProjection makes",
    ),
    "a prompt of a text without the text": (
        {"spec.adapter": {"method": "prompt-tuning", "numVirtualTokens": 8, "promptInit": "text"}},
        "spec.adapter.promptInitText",
        "belongs to promptInit text",
    ),
    "a text for a random prompt": (
        {"spec.adapter": {"method": "prompt-tuning", "numVirtualTokens": 8, "promptInitText": "Answer."}},
        "spec.adapter.promptInitText",
        "belongs to promptInit text",
    ),
    "prompt tuning with an MLP": (
        {"spec.adapter": {"method": "prompt-tuning", "numVirtualTokens": 8, "prefixProjection": True}},
        "spec.adapter.prefixProjection",
        "of method prefix-tuning alone",
    ),
    "the width of no MLP": (
        {"spec.adapter": {**PREFIX, "encoderHiddenSize": 64}},
        "spec.adapter.encoderHiddenSize",
        "set that to true",
    ),
    "virtual tokens that fill a sequence": (
        {"spec.adapter": {**PREFIX, "numVirtualTokens": 1020}},
        "spec.adapter.numVirtualTokens",
        "at least 8 more than numVirtualTokens",
    ),
    "going on from an adapter and from a text": (
        {
            "spec.adapter": {
                **PREFIX,
                "initialAdapter": "pvc://team/jobs/first/adapter",
                "promptInit": "text",
                "promptInitText": "Answer.",
            }
        },
        "spec.adapter.initialAdapter",
        "leave out promptInit",
    ),
    "going on from an MLP": (
        {
            "spec.adapter": {
                **PREFIX,
                "initialAdapter": "pvc://team/jobs/first/adapter",
                "prefixProjection": True,
            }
        },
        "spec.adapter.initialAdapter",
        "prefixProjection, whose MLP no finished adapter has",
    ),
    "a prefix merged into the weights": (
        {"spec.adapter": PREFIX, "spec.output.formats": ["adapter", "merged"]},
        "spec.output.formats",
        "only an adapter of method lora can become part of the weights",
    ),
    "rsLoRA, which does not exist yet": (
        {"spec.adapter.rsLoRA": True},
        "spec.adapter.rsLoRA",
        "no such field",
    ),
    "target modules as a string": (
        {"spec.adapter.targetModules": "all-linear"},
        "spec.adapter.targetModules",
        "must be a list of 1 to 64 items, each a string",
    ),
    "no target modules": (
        {"spec.adapter.targetModules": []},
        "spec.adapter.targetModules",
        "of 1 to 64 items",
    ),
    "target module is empty": (
        {"spec.adapter.targetModules": ["q_proj", ""]},
        "spec.adapter.targetModules[1]",
        "of 1 to 256 characters",
    ),
    "unknown scheme": ({"spec.quantization.scheme": "nf3"}, "spec.quantization.scheme", "one of nf4, fp4"),
    "block size 96": ({"spec.quantization.blockSize": 96}, "spec.quantization.blockSize", "64"),
    "neither epochs nor steps": (
        {"spec.training": {}},
        "spec.training",
        "exactly one of epochs and maxSteps",
    ),
    "both epochs and steps": (
        {"spec.training.maxSteps": 9},
        "spec.training",
        "exactly one of epochs and maxSteps",
    ),
    "no training": ({"spec.training": OMIT}, "spec.training", "is required"),
    "misspelt steps": ({"spec.training.max_steps": 9}, "spec.training.max_steps", "did you mean maxSteps?"),
    "misspelt rate": (
        {"spec.training.learnRate": 1},
        "spec.training.learnRate",
        "did you mean learningRate?",
    ),
    "epochs 0": ({"spec.training.epochs": 0}, "spec.training.epochs", "integer from 1 to 10000"),
    "epochs is a boolean": ({"spec.training.epochs": True}, "spec.training.epochs", "is the boolean true"),
    "step smaller than a sequence": (
        {"spec.training.globalBatchTokens": 512},
        "spec.training",
        "globalBatchTokens must be at least maxSequenceLength",
    ),
    "packing is a string": ({"spec.training.packing": "yes"}, "spec.training.packing", "true or false"),
    "learning rate is a string": (
        {"spec.training.learningRate": "2e-4"},
        "spec.training.learningRate",
        "is the string '2e-4'; it must be a number above 0.0, at most 1.0",
    ),
    "unknown schedule": (
        {"spec.training.schedule": "cos"},
        "spec.training.schedule",
        "linear, cosine, constant",
    ),
    "negative seed": ({"spec.training.seed": -1}, "spec.training.seed", "from 0 to 4294967295"),
    "splitting long samples": (
        {"spec.training.overlong": "split"},
        "spec.training.overlong",
        "truncate, drop, error",
    ),
    "bestModel, which does not exist": (
        {"spec.evaluation.bestModel": True},
        "spec.evaluation.bestModel",
        "no such field; there are everySteps, requireImprovement",
    ),
    "the best of one evaluation": (
        {"spec.evaluation.keepBest": True},
        "spec.evaluation.keepBest",
        "requires everySteps: the best of one evaluation is the last step",
    ),
    "patience without the best": (
        {"spec.evaluation.everySteps": 5, "spec.evaluation.earlyStoppingPatience": 2},
        "spec.evaluation.earlyStoppingPatience",
        "requires keepBest: true",
    ),
    "an initial adapter outside its claim": (
        {"spec.adapter.initialAdapter": "pvc://team/../other"},
        "spec.adapter.initialAdapter",
        "must stay within its claim",
    ),
    "an initial adapter that is data of the Hub": (
        {"spec.adapter.initialAdapter": "hf://datasets/org/a"},
        "spec.adapter.initialAdapter",
        "that is a dataset of the Hub",
    ),
    "the revision of an initial adapter on a claim": (
        {"spec.adapter": {"initialAdapter": "pvc://team/a", "initialAdapterRevision": "v1"}},
        "spec.adapter.initialAdapterRevision",
        "requires an initialAdapter of hf://",
    ),
    "the revision of no initial adapter": (
        {"spec.adapter": {"initialAdapterRevision": "v1"}},
        "spec.adapter.initialAdapterRevision",
        "requires an initialAdapter of hf://",
    ),
    "the Secret of an initial adapter on a claim": (
        {"spec.adapter": {"initialAdapter": "pvc://team/a", "initialAdapterCredentialsSecret": "hub"}},
        "spec.adapter.initialAdapterCredentialsSecret",
        "requires an initialAdapter of hf:// or s3://",
    ),
    "checkpoints never kept": ({"spec.checkpoint.keep": 0}, "spec.checkpoint.keep", "from 1 to 100"),
    "no topology": ({"spec.topology": OMIT}, "spec.topology", "is required: a map with memoryPerRank"),
    "no memory": ({"spec.topology": {}}, "spec.topology.memoryPerRank", "is required: a quantity of memory"),
    "memory is a number": (
        {"spec.topology.memoryPerRank": 16},
        "spec.topology.memoryPerRank",
        "is the number 16; it must be a quantity of memory such as 16Gi, as a string",
    ),
    "memory in GB": ({"spec.topology.memoryPerRank": "16GB"}, "spec.topology.memoryPerRank", "such as 16Gi"),
    "memory in thousandths": ({"spec.topology.memoryPerRank": "16m"}, "spec.topology.memoryPerRank", "16Gi"),
    "memory without suffix": (
        {"spec.topology.memoryPerRank": "16"},
        "spec.topology.memoryPerRank",
        "64Mi to 64Ti",
    ),
    "no memory at all": (
        {"spec.topology.memoryPerRank": "0Gi"},
        "spec.topology.memoryPerRank",
        "64Mi to 64Ti",
    ),
    "memory beyond reason": ({"spec.topology.memoryPerRank": "1Pi"}, "spec.topology.memoryPerRank", "64Ti"),
    "no pods": ({"spec.topology.pods": 0}, "spec.topology.pods", "from 1 to 512"),
    "no pod will do": ({"spec.topology.minPods": 0}, "spec.topology.minPods", "from 1 to 512"),
    "more pods will do than there are": (
        {"spec.topology.pods": 2, "spec.topology.minPods": 3},
        "spec.topology.minPods",
        "may be at most pods",
    ),
    "too many ranks": (
        {"spec.topology.pods": 512, "spec.topology.ranksPerPod": 3},
        "spec.topology",
        "pods times ranksPerPod may be at most 1024 ranks",
    ),
    "ranks chosen otherwise": (
        {"spec.topology.ranksPerPod": "automatic"},
        "spec.topology.ranksPerPod",
        "is the string 'automatic'; it must be an integer from 1 to 64, or auto",
    ),
    "number of ranks as a string": (
        {"spec.topology.ranksPerPod": "2"},
        "spec.topology.ranksPerPod",
        "is the string '2'; it must be an integer from 1 to 64, or auto",
    ),
    "no ranks": (
        {"spec.topology.ranksPerPod": 0},
        "spec.topology.ranksPerPod",
        "is the number 0; it must be an integer from 1 to 64, or auto",
    ),
    "unknown memory tier": ({"spec.topology.memoryTier": "ddr"}, "spec.topology.memoryTier", "any, hbm"),
    "half a CPU": ({"spec.topology.cpusPerRank": 0.5}, "spec.topology.cpusPerRank", "is the number 0.5"),
    "unknown pinning": ({"spec.topology.pinning": "loose"}, "spec.topology.pinning", "strict, best-effort"),
    "no tier allowed": ({"spec.isa.allowed": []}, "spec.isa.allowed", "a list of 1 to 4 items"),
    "unknown tier": (
        {"spec.isa.allowed": ["avx2", "neon"]},
        "spec.isa.allowed[1]",
        "one of amx_bf16, avx512_bf16",
    ),
    "a tier twice": ({"spec.isa.allowed": ["avx2", "avx2"]}, "spec.isa.allowed", "lists avx2 twice"),
    "a backend of GPUs": ({"spec.distributed.backend": "nccl"}, "spec.distributed.backend", "gloo"),
    "selector value is a boolean": (
        {"spec.scheduling.nodeSelector": {"fast": True}},
        "spec.scheduling.nodeSelector.fast",
        "is the boolean true; it must be the value of a label",
    ),
    "selector key is no label": (
        {"spec.scheduling.nodeSelector": {"no label": "a"}},
        "spec.scheduling.nodeSelector",
        "every key must be the name of a label",
    ),
    "selector of 33 labels": (
        {"spec.scheduling.nodeSelector": {f"a{n}": "b" for n in range(33)}},
        "spec.scheduling.nodeSelector",
        "a map of at most 32 entries",
    ),
    "toleration without key": (
        {"spec.scheduling.tolerations": [{"value": "a"}]},
        "spec.scheduling.tolerations[0]",
        "key is required unless operator is Exists",
    ),
    "toleration of existence with value": (
        {"spec.scheduling.tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]},
        "spec.scheduling.tolerations[0]",
        "operator Exists takes no value",
    ),
    "toleration for a time": (
        {"spec.scheduling.tolerations": [{"key": "a", "effect": "NoSchedule", "tolerationSeconds": 5}]},
        "spec.scheduling.tolerations[0]",
        "tolerationSeconds requires effect NoExecute",
    ),
    "toleration of unknown operator": (
        {"spec.scheduling.tolerations": [{"key": "a", "operator": "In"}]},
        "spec.scheduling.tolerations[0].operator",
        "one of Equal, Exists",
    ),
    "priority class with a space": (
        {"spec.scheduling.priorityClassName": "a b"},
        "spec.scheduling.priorityClassName",
        "lower-case letters, digits",
    ),
    "node selector whose prefix is no domain": (
        {"spec.scheduling.nodeSelector": {"a..b/c": "d"}},
        "spec.scheduling.nodeSelector",
        "every key must be the name of a label",
    ),
    "node selector of a long name": (
        {"spec.scheduling.nodeSelector": {"x" * 64: "d"}},
        "spec.scheduling.nodeSelector",
        "every key must be the name of a label",
    ),
    "queue with a space": (
        {"spec.scheduling.queueName": "a b"},
        "spec.scheduling.queueName",
        "lower-case letters, digits, '-' and '.', at most 63 characters",
    ),
    "queue of 64 characters": (
        {"spec.scheduling.queueName": "q" * 64},
        "spec.scheduling.queueName",
        "at most 63",
    ),
    "zone with a space": (
        {"spec.schedule": {"timeZone": "New York", "windows": [{"start": "0 0 * * *", "end": "0 1 * * *"}]}},
        "spec.schedule.timeZone",
        "a time zone, such as Europe/Berlin",
    ),
    "window at 20:00": (
        {"spec.schedule": {"windows": [{"start": "20:00 daily", "durationSeconds": 60}]}},
        "spec.schedule.windows[0].start",
        "five fields as cron has them, such as `0 20 * * MON-FRI`",
    ),
    "end at minute 60": (
        {"spec.schedule": {"windows": [{"start": "0 0 * * *", "end": "60 0 * * *"}]}},
        "spec.schedule.windows[0].end",
        "minute (0-59)",
    ),
    "window without an end": (
        {"spec.schedule": {"windows": [{"start": "0 0 * * *"}]}},
        "spec.schedule.windows[0]",
        "exactly one of end and durationSeconds",
    ),
    "manager without a domain": ({"spec.managedBy": "kueue"}, "spec.managedBy", "a controller such as"),
    "manager with a bad domain": ({"spec.managedBy": "A.io/b"}, "spec.managedBy", "a controller such as"),
    "manager without a path": ({"spec.managedBy": "a.io/"}, "spec.managedBy", "a controller such as"),
    "a pod template": ({"spec.template": {}}, "spec.template", "no such field; there are workspace, model"),
    "a service account": ({"spec.serviceAccountName": "a"}, "spec.serviceAccountName", "no such field"),
    "image with a space": ({"spec.image": "a b"}, "spec.image", "an image, such as"),
    "suspend is a word": ({"spec.suspend": "later"}, "spec.suspend", "must be true or false"),
    "deadline 0": ({"spec.activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds", "from 1 to 2147483647"),
    "negative time to live": ({"spec.ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished", "from 0"),
    "negative backoff limit": ({"spec.backoffLimit": -1}, "spec.backoffLimit", "from 0 to 10000"),
    "backoff limit is null in words": ({"spec.backoffLimit": "none"}, "spec.backoffLimit", "an integer"),
    "no grace": ({"spec.terminationGracePeriodSeconds": 0}, "spec.terminationGracePeriodSeconds", "from 1"),
}
"""What is wrong with a job: the fields changed, the path of the fault, a phrase of its message."""


@pytest.mark.parametrize(("fields", "path", "phrase"), BAD.values(), ids=BAD)
def test_a_bad_job_is_refused_where_it_is_bad(
    fields: dict[str, Any],
    path: str,
    phrase: str,
    changed: Callable[..., dict[str, Any]],
) -> None:
    """The one thing that is wrong with the job is named by its path, with what would be right."""
    job = changed(fields)

    with pytest.raises(InvalidJobError) as error:
        parse_job(job)

    assert [where for where, _ in error.value.faults] == [path]
    assert phrase in error.value.faults[0][1]


GOOD = {
    "going on from an adapter of the Hub": {
        "spec.adapter": {
            "initialAdapter": "hf://org/a",
            "initialAdapterRevision": "v1",
            "initialAdapterCredentialsSecret": "hub",
        }
    },
    "going on from an adapter of a bucket": {
        "spec.adapter": {"initialAdapter": "s3://bucket/a", "initialAdapterCredentialsSecret": "store"}
    },
    "going on from a prefix": {"spec.adapter": {**PREFIX, "initialAdapter": "pvc://team/jobs/first/adapter"}},
    "prefix tuning": {"spec.adapter": {**PREFIX, "prefixProjection": True, "encoderHiddenSize": 64}},
    "prompt tuning from a text": {
        "spec.adapter": {
            "method": "prompt-tuning",
            "numVirtualTokens": 8,
            "promptInit": "text",
            "promptInitText": "Answer.",
        }
    },
    "LoRA's defaults beside another method, as API servers add them": {
        "spec.adapter": {**PREFIX, "rank": 16, "alpha": 32, "dropout": 0, "targetModules": ["all-linear"]}
    },
    "by steps": {"spec.training": {"maxSteps": 400}},
    "null is as good as absent": {"spec.training": {"epochs": 1, "maxSteps": None}, "spec.adapter": None},
    "a batch of one sequence": {"spec.training.globalBatchTokens": 1024},
    "integers where numbers may be": {"spec.training.learningRate": 1, "spec.adapter.alpha": 16},
    "the longest name": {"metadata.name": "a" * 50},
    "a name of one letter": {"metadata.name": "a"},
    "the whole claim as workspace": {"spec.workspace": "pvc://team-data"},
    "dots in a path": {"spec.model.source": "pvc://c/..a/b../.../v1.5"},
    "as many ranks as there may be": {"spec.topology.pods": 512, "spec.topology.ranksPerPod": 2},
    "all pods are wanted": {"spec.topology.pods": 2, "spec.topology.minPods": 2},
    "least memory": {"spec.topology.memoryPerRank": "64Mi"},
    "memory in bytes": {"spec.topology.memoryPerRank": "17179869184"},
    "one tier": {"spec.isa": {"allowed": ["avx2"]}},
    "tiers in another order": {"spec.isa.allowed": ["avx2", "amx_bf16"]},
    "every taint tolerated": {"spec.scheduling": {"tolerations": [{"operator": "Exists"}]}},
    "an empty taint value": {"spec.scheduling": {"tolerations": [{"key": "a", "value": ""}]}},
    "label keys with a prefix": {
        "spec.scheduling": {"nodeSelector": {"kubernetes.io/os": "linux", "a_B.c": ""}}
    },
    "an image by digest": {"spec.image": "registry.example:5000/a/b@sha256:" + "0" * 64},
    "a queue": {"spec.scheduling": {"queueName": "team.queue-1"}},
    "nights and weekends": {
        "spec.schedule": {
            "timeZone": "America/Argentina/Buenos_Aires",
            "windows": [
                {"start": "0 20 * * MON-THU", "end": "0 6 * * *"},
                {"start": "0 20 * * fri", "durationSeconds": 58 * 3600},
            ],
        }
    },
    "a zone whose name has digits": {
        "spec.schedule": {
            "timeZone": "Etc/GMT+12",
            "windows": [{"start": "*/5 22-5 1,15 1-12 0-7/2", "durationSeconds": 60}],
        }
    },
    "managed by this operator": {"spec.managedBy": names.CONTROLLER},
    "managed by another": {"spec.managedBy": "kueue.x-k8s.io/multikueue"},
    "delete at once": {"spec.ttlSecondsAfterFinished": 0},
    "a model of the Hub": {"spec.model.source": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
    "a model of the Hub, with a slash": {"spec.model.source": "hf://org/name/"},
    "a model at a revision": {
        "spec.model": {"source": "hf://o/n", "revision": "refs/pr/7", "credentialsSecret": "hub.token"}
    },
    "a revision that is the default, written out": {"spec.model.revision": "main"},
    "a model of a bucket": {"spec.model": {"source": "s3://b-1.c/a b/m", "credentialsSecret": "store"}},
    "a whole bucket": {"spec.model.source": "s3://bucket"},
    "a dataset of the Hub": {"spec.dataset": {"source": "hf://datasets/org/name", "revision": "v1"}},
    "a file of a dataset": {"spec.dataset.source": "hf://datasets/org/name/data/train.jsonl"},
    "a file of a bucket": {"spec.dataset": {"source": "s3://bucket/docs.jsonl", "credentialsSecret": "s"}},
    "a destination of the Hub": {"spec.output": {"destination": "hf://org/adapter"}},
    "a destination in a bucket": {
        "spec.output": {"destination": "s3://bucket/a/b/", "credentialsSecret": "writer"}
    },
    "never retry": {"spec.backoffLimit": 0, "spec.infrastructureBackoffLimit": 0},
}


@pytest.mark.parametrize("fields", GOOD.values(), ids=GOOD)
def test_a_good_job_is_accepted(fields: dict[str, Any], changed: Callable[..., dict[str, Any]]) -> None:
    """What the description of a field allows is allowed, up to its bounds."""
    assert parse_job(changed(fields)) is not None


def test_every_fault_is_reported(changed: Callable[..., dict[str, Any]]) -> None:
    """A job with several faults is not refused one fault at a time."""
    job = changed(
        {"metadata.name": "Docs", "spec.adapter.rank": 0, "spec.trainnig": {}, "metadata.lable": {}}
    )

    with pytest.raises(InvalidJobError) as error:
        parse_job(job)

    assert {path for path, _ in error.value.faults} == {
        "metadata.lable",
        "metadata.name",
        "spec.adapter.rank",
        "spec.trainnig",
    }


def test_what_the_api_server_adds_is_passed_over(changed: Callable[..., dict[str, Any]]) -> None:
    """A job as `kubectl get -o yaml` shows it is as valid as the file that it was made from."""
    job = changed(
        {
            "metadata.uid": "0",
            "metadata.resourceVersion": "12",
            "metadata.generation": 2,
            "metadata.creationTimestamp": "2026-01-01T00:00:00Z",
            "metadata.managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
            "metadata.ownerReferences": [{"kind": "X"}],
            "metadata.finalizers": ["a.b/c"],
            "status": {"phase": "NotYetInvented", "conditions": "unreadable"},
        }
    )

    assert parse_job(job) is not None


def test_the_operator_reads_its_own_status_back(minimal: dict[str, Any]) -> None:
    """A status with every kind of entry survives a round trip, fields of a newer operator apart."""
    status = {
        "observedGeneration": 1,
        "phase": "Running",
        "conditions": [
            {
                "type": "Running",
                "status": "True",
                "observedGeneration": 1,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
                "reason": "Training",
                "message": "2 ranks train",
            }
        ],
        "restarts": {"user": 1, "infrastructure": 0},
        "attempts": [
            {"attempt": 0, "stage": "fetch", "reason": "Fetched", "exitCodes": [0]},
            {"attempt": 1, "stage": "train", "exitCodes": [50]},
        ],
        "adapter": {"uri": "pvc://c/a", "publishedUri": "s3://bucket/a"},
        "provenance": {"modelRevision": "c0ffee", "datasetRevision": "d0d0"},
        "progress": {"step": 120, "loss": 1.83},
        "columns": {"ranks": "2/2", "step": "120/400", "eta": "9m"},
    }
    read = QLoRAJob.model_validate({**minimal, "status": {**status, "inventedLater": 1}})

    assert read.status is not None
    assert read.status.phase is names.Phase.RUNNING
    dumped = read.status.model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert dumped == status


def test_a_parsed_job_cannot_be_changed(minimal: dict[str, Any]) -> None:
    """Models are frozen: a change would let what runs differ from what was read."""
    job = parse_job(minimal)

    assert job is not None
    with pytest.raises(ValueError, match="frozen"):
        job.spec.suspend = True  # type: ignore[misc]


def test_constants_agree_with_the_types() -> None:
    """The literal types spell the constants, and the tiers are the contract's."""
    fields = QLoRAJob.model_fields

    assert fields["api_version"].annotation.__args__ == (names.API_VERSION,)  # type: ignore[union-attr]
    assert fields["kind"].annotation.__args__ == (names.KIND,)  # type: ignore[union-attr]
    assert tuple(QLoRAJobSpec.model_fields["isa"].default.allowed) == ISA_TIERS


def test_the_sets_of_fields_name_fields_that_exist() -> None:
    """What is called mutable or the operator's own is a field of spec."""
    aliases = {str(info.alias) for info in QLoRAJobSpec.model_fields.values()}

    assert aliases >= MUTABLE | MUTABLE_WHILE_SUSPENDED
    assert {path.split(".")[1] for path in OPERATOR_ONLY} <= aliases


def test_what_a_run_config_carries_is_not_the_operators_alone() -> None:
    """A field that reaches the trainer is never named as ignored."""
    carried = {f"spec.{info.alias}" for info in RunConfig.model_fields.values()}

    assert carried & set(OPERATOR_ONLY) == set()


def test_the_operators_own_fields_are_named_if_the_file_sets_them(minimal: dict[str, Any]) -> None:
    """`qlora run` says what it ignores of a file, and nothing about what the file leaves out."""
    smallest = parse_job(minimal)
    (full,) = load_jobs(str(SAMPLES / "full.yaml"))

    assert smallest is not None
    assert ignored_by_run(smallest) == []
    unset = {
        "spec.image",
        "spec.managedBy",
        "spec.model.credentialsSecret",
        "spec.dataset.credentialsSecret",
        "spec.dataset.sources.credentialsSecret",
        "spec.adapter.initialAdapterCredentialsSecret",
        "spec.tracking.mlflow.credentialsSecret",
    }
    assert ignored_by_run(full) == [path for path in OPERATOR_ONLY if path not in unset]


def test_a_secret_is_named_as_ignored(changed: Callable[..., dict[str, Any]]) -> None:
    """`qlora run` has no Secrets: whose credentials it leaves out is told by the field."""
    job = parse_job(
        changed(
            {
                "spec.model": {"source": "hf://org/name", "credentialsSecret": "hub"},
                "spec.dataset": {"source": "s3://bucket/data", "credentialsSecret": "store"},
                "spec.output": {"destination": "s3://bucket/out"},
            }
        )
    )
    mixed = parse_job(
        changed({"spec.dataset": {"sources": [{"source": "s3://bucket/data", "credentialsSecret": "store"}]}})
    )

    assert job is not None
    assert mixed is not None
    assert ignored_by_run(job) == ["spec.model.credentialsSecret", "spec.dataset.credentialsSecret"]
    assert ignored_by_run(mixed) == ["spec.dataset.sources.credentialsSecret"]


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({}, True),
        ({"spec.topology.pods": 1}, True),
        ({"spec.suspend": True, "spec.backoffLimit": 9}, True),
        ({"spec.topology.pods": 7}, False),
        ({"spec.scheduling": {"nodeSelector": {"a": "b"}}}, False),
    ],
    ids=["itself", "a default written out", "what may change at any time", "topology", "scheduling"],
)
def test_held_fields_tell_what_may_change_only_while_suspended(
    fields: dict[str, Any], same: bool, minimal: dict[str, Any], changed: Callable[..., dict[str, Any]]
) -> None:
    """The hash is another one exactly when a field of MUTABLE_WHILE_SUSPENDED has another value."""
    before, after = parse_job(minimal), parse_job(changed(fields))
    assert before is not None
    assert after is not None

    assert (topology_hash(before.spec) == topology_hash(after.spec)) == same
