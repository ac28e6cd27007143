"""What is no job: refused by the API server with path and reason, and by `qlora validate` alike."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import OMIT, changed
from qlora_operator.api import names, quantity
from qlora_operator.api.loader import parse_job
from qlora_operator.api.schema import Schema, job_schema
from qlora_operator.api.yaml_reader import read_documents
from qlora_operator.cli.validate import INVALID, validate
from qlora_operator.errors import InvalidJobError
from testcluster.client import ApiError, Client
from testcluster.cluster import Cluster

pytestmark = pytest.mark.cluster

SAMPLES = Path(__file__).parents[2] / "manifests/samples"
JOBS = f"/apis/{names.API_VERSION}/namespaces/default/{names.PLURAL}"
STRICT = "fieldValidation=Strict&dryRun=All"

Object = dict[str, Any]


@pytest.fixture(scope="module")
def client(api_cluster: Cluster, crd: None) -> Client:
    """Of a server that knows jobs."""
    return api_cluster.client


def sample(name: str) -> Object:
    """A sample job."""
    (job,) = read_documents((SAMPLES / f"{name}.yaml").read_bytes())
    return dict(job)


MINIMAL = sample("minimal")


def refusal(client: Client, job: Object) -> str | None:
    """Why the API server refuses to create the job; None if it does not."""
    try:
        client.post(f"{JOBS}?{STRICT}", job)
    except ApiError as error:
        if error.code not in (400, 422):
            raise
        return error.message
    return None


LOW, HIGH = "greater than or equal to", "less than or equal to"
UNKNOWN = "unknown field"
CLAIM = "should match '^(pvc://"
HUB = "should match '^(hf://"
INSIDE = "must stay within its claim: the path may not contain `..`"
NAME = "begins with a letter and does not end with a hyphen, at most 50 characters"
ONE_OF = "exactly one of epochs and maxSteps must be given"
MEMORY = "must be from 64Mi to 64Ti; without a suffix the number means bytes"
KEY = "every key must be the name of a label, such as kubernetes.io/hostname"
TOLERATION = "spec.scheduling.tolerations[0]"


REVISION = "requires an hf:// source"
CREDENTIALS = "requires an hf:// or s3:// source"


def remote(**fields: object) -> Object:
    """A change that gives the job a model of the Hub."""
    return {"spec.model": {"source": "hf://org/name", **fields}}


def tolerating(**fields: object) -> Object:
    """A change that gives the job one toleration."""
    return {"spec.scheduling": {"tolerations": [fields]}}


WINDOW = "spec.schedule.windows[0]"
CRON = "five fields as cron has them"


def opening(**fields: object) -> Object:
    """A change that gives the job one window."""
    return {"spec.schedule": {"windows": [fields]}}


def selecting(key: str, value: object = "a") -> Object:
    """A change that gives the job a node selector."""
    return {"spec.scheduling": {"nodeSelector": {key: value}}}


# fmt: off
BAD: dict[str, tuple[Object, str, str]] = {
    # names
    "no name": ({"metadata.name": OMIT}, "metadata.name", "Required value"),
    "name is empty": ({"metadata.name": ""}, "metadata.name", "Required value"),
    "name of 51 characters": ({"metadata.name": "a" * 51}, "metadata.name", NAME),
    "name with a dot": ({"metadata.name": "docs.v1"}, "metadata.name", NAME),
    "name begins with a digit": ({"metadata.name": "7b"}, "metadata.name", NAME),
    "name ends with a hyphen": ({"metadata.name": "docs-"}, "metadata.name", NAME),
    "name in capitals": ({"metadata.name": "Docs"}, "metadata.name", NAME),
    "name is not ASCII": ({"metadata.name": "\N{LATIN SMALL LETTER E WITH ACUTE}t"}, "metadata.name", NAME),
    "name ends with a line break": ({"metadata.name": "docs\n"}, "metadata.name", NAME),
    "label with a space": ({"metadata.labels": {"a": "b c"}}, "metadata.labels", "a valid label must be"),
    "label of 64 characters": ({"metadata.labels": {"a": "b" * 64}}, "metadata.labels", "no more than 63"),
    "label key with a space": ({"metadata.labels": {"a b": "c"}}, "metadata.labels", "name part must consist"),
    "label key without a name": ({"metadata.labels": {"a.b/": "c"}}, "metadata.labels", "name part must be"),
    "label prefix in capitals": ({"metadata.labels": {"A.b/c": "d"}}, "metadata.labels", "lowercase RFC 1123"),
    "label prefix of 254": ({"metadata.labels": {f"{'a' * 254}/b": "c"}}, "metadata.labels", "no more than 253"),
    "annotation key with a space": ({"metadata.annotations": {"a b": ""}}, "metadata.annotations", "name part"),
    "annotation key of 64": ({"metadata.annotations": {"a" * 64: ""}}, "metadata.annotations", "than 63"),
    "misspelt labels": ({"metadata.lables": {}}, "metadata.lables", UNKNOWN),
    # shape
    "no spec": ({"spec": OMIT}, "spec", "Required value"),
    "spec is a list": ({"spec": []}, "spec", "must be of type object"),
    "misspelt spec": ({"specs": {}}, "specs", UNKNOWN),
    "a pod template": ({"spec.template": {}}, "spec.template", UNKNOWN),
    "a service account": ({"spec.serviceAccountName": "a"}, "spec.serviceAccountName", UNKNOWN),
    "unknown field that is null": ({"spec.environment": None}, "spec.environment", UNKNOWN),
    # sources
    "no workspace": ({"spec.workspace": OMIT}, "spec.workspace", "Required value"),
    "workspace is empty": ({"spec.workspace": ""}, "spec.workspace", "at least 6 chars long"),
    "workspace without a claim": ({"spec.workspace": "pvc:///a"}, "spec.workspace", CLAIM),
    "workspace in capitals": ({"spec.workspace": "pvc://Team/a"}, "spec.workspace", CLAIM),
    "workspace with two slashes": ({"spec.workspace": "pvc://team//a"}, "spec.workspace", CLAIM),
    "workspace leaves its claim": ({"spec.workspace": "pvc://team/../b"}, "spec.workspace", INSIDE),
    "workspace ends upwards": ({"spec.workspace": "pvc://team/a/.."}, "spec.workspace", INSIDE),
    "workspace with a line break": ({"spec.workspace": "pvc://team/a\nb"}, "spec.workspace", CLAIM),
    "workspace with a null character": ({"spec.workspace": "pvc://team/a\0b"}, "spec.workspace", CLAIM),
    "workspace is too long": ({"spec.workspace": "pvc://c/" + "a" * 505}, "spec.workspace", "Too long"),
    "workspace is a number": ({"spec.workspace": 7}, "spec.workspace", "must be of type string"),
    "no model": ({"spec.model": OMIT}, "spec.model", "Required value"),
    "model is a string": ({"spec.model": "pvc://c/m"}, "spec.model", "must be of type object"),
    "model without source": ({"spec.model": {}}, "spec.model.source", "Required value"),
    "model by https": ({"spec.model.source": "https://a/b"}, "spec.model.source", CLAIM),
    "model without an organisation": ({"spec.model.source": "hf://gpt2"}, "spec.model.source", CLAIM),
    "a file of the Hub as model": ({"spec.model.source": "hf://a/b/c.safetensors"}, "spec.model.source", CLAIM),
    "a dataset as model": ({"spec.model.source": "hf://datasets/a/b"}, "spec.model.source", CLAIM),
    "model of a bucket in capitals": ({"spec.model.source": "s3://Abc/m"}, "spec.model.source", CLAIM),
    "model of a bucket with credentials": ({"spec.model.source": "s3://key:secret@abc/m"}, "model.source", CLAIM),
    "model leaves its bucket": ({"spec.model.source": "s3://abc/../m"}, "spec.model.source", INSIDE),
    "model leaves its claim": ({"spec.model.source": "pvc://c/../m"}, "spec.model.source", INSIDE),
    "revision of a model on a claim": ({"spec.model.revision": "a"}, "spec.model.revision", REVISION),
    "revision of a model in a bucket": (
        {"spec.model": {"source": "s3://abc/m", "revision": "a"}}, "spec.model.revision", REVISION),
    "revision with a space": (remote(revision="a b"), "spec.model.revision", "should match"),
    "revision that climbs": (remote(revision="../a"), "spec.model.revision", "should match"),
    "revision of 129 characters": (remote(revision="a" * 129), "spec.model.revision", "Too long"),
    "revision is empty": (remote(revision=""), "spec.model.revision", "at least 1 chars"),
    "credentials for a model on a claim": (
        {"spec.model.credentialsSecret": "a"}, "spec.model.credentialsSecret", CREDENTIALS),
    "credentials of another namespace": (
        remote(credentialsSecret="a/b"), "spec.model.credentialsSecret", "should match"),
    "credentials in place of their Secret": (
        remote(credentialsSecret={"token": "a"}), "spec.model.credentialsSecret", UNKNOWN),
    "credentials of 254 characters": (
        remote(credentialsSecret="a" * 254), "spec.model.credentialsSecret", "Too long"),
    "no dataset": ({"spec.dataset": OMIT}, "spec.dataset", "Required value"),
    "dataset leaves its claim": ({"spec.dataset.source": "pvc://c/a/../../b"}, "spec.dataset.source", INSIDE),
    "dataset leaves its repository": (
        {"spec.dataset.source": "hf://datasets/a/b/../c"}, "spec.dataset.source", INSIDE),
    "dataset of the Hub without its word": ({"spec.dataset.source": "hf://a/b"}, "spec.dataset.source", CLAIM),
    "revision of a dataset on a claim": ({"spec.dataset.revision": "a"}, "spec.dataset.revision", REVISION),
    "credentials for a dataset on a claim": (
        {"spec.dataset.credentialsSecret": "a"}, "spec.dataset.credentialsSecret", CREDENTIALS),
    "destination on a claim": (
        {"spec.output": {"destination": "pvc://c/a"}}, "spec.output.destination", HUB),
    "destination among the datasets": (
        {"spec.output": {"destination": "hf://datasets/a/b"}}, "spec.output.destination", HUB),
    "destination leaves its bucket": (
        {"spec.output": {"destination": "s3://abc/a/.."}}, "spec.output.destination", "must stay within its bucket"),
    "credentials without a destination": (
        {"spec.output": {"credentialsSecret": "a"}}, "spec.output.credentialsSecret", "requires a destination"),
    "misspelt destination": ({"spec.output": {"destinaton": "s3://abc"}}, "spec.output.destinaton", UNKNOWN),
    "unknown format": ({"spec.dataset.format": "xml"}, "spec.dataset.format", '"chat", "prompt-completion"'),
    "split is a path": ({"spec.dataset.trainSplit": "../x"}, "spec.dataset.trainSplit", "should match"),
    "split is empty": ({"spec.dataset.evalSplit": ""}, "spec.dataset.evalSplit", "at least 1 chars"),
    "split of 65 characters": ({"spec.dataset.evalSplit": "a" * 65}, "spec.dataset.evalSplit", "Too long"),
    "eval fraction above a half": ({"spec.dataset.evalFraction": 0.51}, "spec.dataset.evalFraction", HIGH),
    "eval fraction below 0": ({"spec.dataset.evalFraction": -0.1}, "spec.dataset.evalFraction", LOW),
    # adapter and quantisation
    "rank 0": ({"spec.adapter.rank": 0}, "spec.adapter.rank", f"{LOW} 1"),
    "rank 513": ({"spec.adapter.rank": 513}, "spec.adapter.rank", f"{HIGH} 512"),
    "rank is a string": ({"spec.adapter.rank": "16"}, "spec.adapter.rank", "must be of type integer"),
    "rank is a fraction": ({"spec.adapter.rank": 1.5}, "spec.adapter.rank", "must be of type integer"),
    "rank is a boolean": ({"spec.adapter.rank": True}, "spec.adapter.rank", "must be of type integer"),
    "rank beyond 64 bits": ({"spec.adapter.rank": 2**63}, "spec.adapter.rank", "must be of type integer"),
    "alpha 0": ({"spec.adapter.alpha": 0}, "spec.adapter.alpha", "should be greater than 0"),
    "dropout 1": ({"spec.adapter.dropout": 1}, "spec.adapter.dropout", "should be less than 1"),
    "unknown method": ({"spec.adapter.method": "dora"}, "spec.adapter.method", 'supported values: "lora"'),
    "prefix tuning without tokens": (
        {"spec.adapter": {"method": "prefix-tuning"}}, "spec.adapter.numVirtualTokens", "number of virtual tokens"),
    "LoRA with virtual tokens": ({"spec.adapter.numVirtualTokens": 8}, "numVirtualTokens", "lora has none"),
    "prompt tuning with a rank": (
        {"spec.adapter": {"method": "prompt-tuning", "numVirtualTokens": 8, "rank": 8}}, "spec.adapter.rank",
        "is a setting of method lora"),
    "prefix tuning of chosen layers": (
        {"spec.adapter": {"method": "prefix-tuning", "numVirtualTokens": 8, "targetModules": ["q_proj"]}},
        "spec.adapter.targetModules", "is a setting of method lora"),
    "a prompt of a text without the text": (
        {"spec.adapter": {"method": "prompt-tuning", "numVirtualTokens": 8, "promptInit": "text"}},
        "spec.adapter.promptInitText", "belongs to promptInit text"),
    "virtual tokens that fill a sequence": (
        {"spec.adapter": {"method": "prefix-tuning", "numVirtualTokens": 1020}}, "numVirtualTokens", "at least 8 more"),
    "going on from an adapter and from a text": (
        {"spec.adapter": {"method": "prefix-tuning", "numVirtualTokens": 8, "promptInit": "text",
         "promptInitText": "Answer.", "initialAdapter": "pvc://team/jobs/first/adapter"}},
        "spec.adapter.initialAdapter", "leave out promptInit"),
    "going on from an MLP": (
        {"spec.adapter": {"method": "prefix-tuning", "numVirtualTokens": 8, "prefixProjection": True,
         "initialAdapter": "pvc://team/jobs/first/adapter"}},
        "spec.adapter.initialAdapter", "whose MLP no finished adapter has"),
    "the revision of an initial adapter on a claim": (
        {"spec.adapter": {"initialAdapter": "pvc://team/a", "initialAdapterRevision": "v1"}},
        "spec.adapter.initialAdapterRevision", "requires an initialAdapter of hf://"),
    "the Secret of an initial adapter on a claim": (
        {"spec.adapter": {"initialAdapter": "pvc://team/a", "initialAdapterCredentialsSecret": "hub"}},
        "spec.adapter.initialAdapterCredentialsSecret", "requires an initialAdapter of hf:// or s3://"),
    "a prefix merged into the weights": (
        {"spec.adapter": {"method": "prefix-tuning", "numVirtualTokens": 8}, "spec.output": {"formats": ["merged"]}},
        "spec.output.formats", "only an adapter of method lora"),
    "rsLoRA, which does not exist yet": ({"spec.adapter.rsLoRA": True}, "spec.adapter.rsLoRA", UNKNOWN),
    "no target module": ({"spec.adapter.targetModules": []}, "spec.adapter.targetModules", "at least 1 items"),
    "65 target modules": ({"spec.adapter.targetModules": ["a"] * 65}, "spec.adapter.targetModules", "Too many"),
    "empty target module": ({"spec.adapter.targetModules": ["a", ""]}, "targetModules[1]", "at least 1 chars"),
    "long target module": ({"spec.adapter.targetModules": ["a" * 257]}, "targetModules[0]", "Too long"),
    "null target module": ({"spec.adapter.targetModules": [None]}, "targetModules[0]", "must be of type string"),
    "unknown scheme": ({"spec.quantization.scheme": "int3"}, "spec.quantization.scheme", '"fp4", "int8", "none"'),
    "block size 96": ({"spec.quantization.blockSize": 96}, "spec.quantization.blockSize", '"64", "128"'),
    # training
    "no training": ({"spec.training": OMIT}, "spec.training", "Required value"),
    "neither epochs nor steps": ({"spec.training": {}}, "spec.training", ONE_OF),
    "both epochs and steps": ({"spec.training.maxSteps": 9}, "spec.training", ONE_OF),
    "epochs 0": ({"spec.training.epochs": 0}, "spec.training.epochs", f"{LOW} 1"),
    "misspelt steps": ({"spec.training.max_steps": 9}, "spec.training.max_steps", UNKNOWN),
    "step smaller than a sequence": (
        {"spec.training.globalBatchTokens": 512}, "spec.training", "must be at least maxSequenceLength"),
    "sequence longer than the default step": (
        {"spec.training.maxSequenceLength": 8193}, "spec.training", "must be at least maxSequenceLength"),
    "packing is a word": ({"spec.training.packing": "always"}, "spec.training.packing", "type boolean"),
    "learning rate is a string": ({"spec.training.learningRate": "2e-4"}, "spec.training.learningRate", "number"),
    "learning rate 0": ({"spec.training.learningRate": 0}, "spec.training.learningRate", "greater than 0"),
    "learning rate above 1": ({"spec.training.learningRate": 2}, "spec.training.learningRate", f"{HIGH} 1"),
    "unknown schedule": ({"spec.training.schedule": "cos"}, "spec.training.schedule", '"linear", "cosine"'),
    "negative seed": ({"spec.training.seed": -1}, "spec.training.seed", f"{LOW} 0"),
    "seed beyond 32 bits": ({"spec.training.seed": 2**32}, "spec.training.seed", HIGH),
    "unknown dtype": ({"spec.training.computeDtype": "fp16"}, "spec.training.computeDtype", '"bf16", "fp32"'),
    "evaluation every 0 steps": ({"spec.evaluation.everySteps": 0}, "spec.evaluation.everySteps", f"{LOW} 1"),
    "bestModel, which does not exist": ({"spec.evaluation.bestModel": True}, "bestModel", UNKNOWN),
    "the best of one evaluation": ({"spec.evaluation.keepBest": True}, "keepBest", "requires everySteps"),
    "patience without the best": (
        {"spec.evaluation.everySteps": 5, "spec.evaluation.earlyStoppingPatience": 2},
        "earlyStoppingPatience",
        "requires keepBest: true",
    ),
    "checkpoints never kept": ({"spec.checkpoint.keep": 0}, "spec.checkpoint.keep", f"{LOW} 1"),
    # topology and processors
    "no topology": ({"spec.topology": OMIT}, "spec.topology", "Required value"),
    "no memory": ({"spec.topology": {}}, "spec.topology.memoryPerRank", "Required value"),
    "memory is a number": ({"spec.topology.memoryPerRank": 16}, "spec.topology.memoryPerRank", "type string"),
    "memory in GB": ({"spec.topology.memoryPerRank": "16GB"}, "spec.topology.memoryPerRank", "Gi|Ti|Pi"),
    "memory in thousandths": ({"spec.topology.memoryPerRank": "16m"}, "spec.topology.memoryPerRank", MEMORY),
    "memory without suffix": ({"spec.topology.memoryPerRank": "16"}, "spec.topology.memoryPerRank", MEMORY),
    "half a byte too little memory": (
        {"spec.topology.memoryPerRank": f"{2**26 - 1}.5"}, "spec.topology.memoryPerRank", MEMORY),
    "memory beyond reason": ({"spec.topology.memoryPerRank": "65Ti"}, "spec.topology.memoryPerRank", MEMORY),
    "no pods": ({"spec.topology.pods": 0}, "spec.topology.pods", f"{LOW} 1"),
    "no pod will do": ({"spec.topology.minPods": 0}, "spec.topology.minPods", f"{LOW} 1"),
    "more pods will do than there are": (
        {"spec.topology.pods": 2, "spec.topology.minPods": 3}, "spec.topology.minPods", "at most pods"),
    "too many ranks": (
        {"spec.topology.pods": 512, "spec.topology.ranksPerPod": 3}, "spec.topology", "at most 1024 ranks"),
    "no ranks": ({"spec.topology.ranksPerPod": 0}, "spec.topology.ranksPerPod", f"{LOW} 1"),
    "too many ranks of a pod": ({"spec.topology.ranksPerPod": 65}, "spec.topology.ranksPerPod", f"{HIGH} 64"),
    "ranks in another word": (
        {"spec.topology.ranksPerPod": "all"}, "spec.topology.ranksPerPod", "should match '^auto$'"),
    "ranks as a string": ({"spec.topology.ranksPerPod": "2"}, "spec.topology.ranksPerPod", "should match '^auto$'"),
    "half a rank": ({"spec.topology.ranksPerPod": 1.5}, "spec.topology.ranksPerPod", "must be"),
    "unknown memory tier": ({"spec.topology.memoryTier": "ddr"}, "spec.topology.memoryTier", "any"),
    "half a CPU": ({"spec.topology.cpusPerRank": 0.5}, "spec.topology.cpusPerRank", "must be of type integer"),
    "unknown pinning": ({"spec.topology.pinning": "loose"}, "spec.topology.pinning", '"best-effort"'),
    "no tier allowed": ({"spec.isa": {"allowed": []}}, "spec.isa.allowed", "at least 1 items"),
    "unknown tier": ({"spec.isa": {"allowed": ["avx2", "neon"]}}, "spec.isa.allowed[1]", '"avx512", "avx2"'),
    "a tier twice": ({"spec.isa": {"allowed": ["avx2", "avx2"]}}, "spec.isa.allowed", "Duplicate value"),
    "unknown backend": ({"spec.distributed.backend": "nccl"}, "spec.distributed.backend", '"gloo"'),
    "heartbeat of a second": ({"spec.distributed.timeoutSeconds": 1}, "timeoutSeconds", f"{LOW} 5"),
    # scheduling
    "selector value is a boolean": (selecting("a", value=True), "spec.scheduling.nodeSelector.a", "type string"),
    "selector value with a space": (selecting("a", "b c"), "spec.scheduling.nodeSelector.a", "should match"),
    "selector value of 64": (selecting("a", "b" * 64), "spec.scheduling.nodeSelector.a", "Too long"),
    "selector key with a space": (selecting("a b"), "spec.scheduling.nodeSelector", KEY),
    "selector key is empty": (selecting(""), "spec.scheduling.nodeSelector", KEY),
    "selector key of 64 characters": (selecting("a" * 64), "spec.scheduling.nodeSelector", KEY),
    "selector prefix is no domain": (selecting("a..b/c"), "spec.scheduling.nodeSelector", KEY),
    "selector of 33 labels": (
        {"spec.scheduling": {"nodeSelector": {f"a{n}": "" for n in range(33)}}}, "nodeSelector", "Too many"),
    "toleration without key": (tolerating(value="a"), TOLERATION, "key is required unless operator is Exists"),
    "toleration of existence with value": (
        tolerating(key="a", operator="Exists", value="b"), TOLERATION, "operator Exists takes no value"),
    "toleration of unknown operator": (tolerating(key="a", operator="In"), f"{TOLERATION}.operator", '"Equal"'),
    "toleration of unknown effect": (tolerating(key="a", effect="Never"), f"{TOLERATION}.effect", '"NoExecute"'),
    "toleration for a time of another effect": (
        tolerating(key="a", effect="NoSchedule", tolerationSeconds=5), TOLERATION, "requires effect NoExecute"),
    "toleration with an unknown field": (tolerating(key="a", vlaue="b"), f"{TOLERATION}.vlaue", UNKNOWN),
    "33 tolerations": ({"spec.scheduling": {"tolerations": [{"key": "a"}] * 33}}, "tolerations", "Too many"),
    "priority class with a space": (
        {"spec.scheduling": {"priorityClassName": "a b"}}, "spec.scheduling.priorityClassName", "should match"),
    "queue with a space": ({"spec.scheduling": {"queueName": "a b"}}, "spec.scheduling.queueName", "match"),
    "queue of 64 characters": ({"spec.scheduling": {"queueName": "q" * 64}}, "queueName", "Too long"),
    "queue is empty": ({"spec.scheduling": {"queueName": ""}}, "spec.scheduling.queueName", "at least 1 chars"),
    # the schedule
    "no windows": ({"spec.schedule": {"timeZone": "UTC"}}, "spec.schedule.windows", "Required value"),
    "windows, and none of them": ({"spec.schedule": {"windows": []}}, "spec.schedule.windows", "at least 1 items"),
    "17 windows": (
        {"spec.schedule": {"windows": [{"start": "0 0 * * *", "durationSeconds": 60}] * 17}}, "windows", "Too many"),
    "window without a start": (opening(durationSeconds=60), f"{WINDOW}.start", "Required value"),
    "window without an end": (opening(start="0 0 * * *"), WINDOW, "exactly one of end and durationSeconds"),
    "window with two ends": (
        opening(start="0 0 * * *", end="0 1 * * *", durationSeconds=60), WINDOW, "exactly one of end"),
    "window at 25 o'clock": (opening(start="0 25 * * *", durationSeconds=60), f"{WINDOW}.start", CRON),
    "window at 20:00": (opening(start="20:00 daily", durationSeconds=60), f"{WINDOW}.start", CRON),
    "window until six fields": (opening(start="0 0 * * *", end="0 0 6 * * *"), f"{WINDOW}.end", CRON),
    "window of 59 seconds": (opening(start="0 0 * * *", durationSeconds=59), f"{WINDOW}.durationSeconds", f"{LOW} 60"),
    "window of a duration in words": (opening(start="0 0 * * *", durationSeconds="10h"), "durationSeconds", "integer"),
    "zone with a space": (
        {"spec.schedule": {"timeZone": "New York", "windows": [{"start": "0 0 * * *", "durationSeconds": 60}]}},
        "spec.schedule.timeZone", "should match"),
    # the rest
    "manager without a domain": ({"spec.managedBy": "kueue"}, "spec.managedBy", "should match"),
    "manager without a path": ({"spec.managedBy": "a.io/"}, "spec.managedBy", "should match"),
    "manager of 64 characters": ({"spec.managedBy": "a.io/" + "b" * 59}, "spec.managedBy", "Too long"),
    "image with a space": ({"spec.image": "a b"}, "spec.image", "should match"),
    "image of 513 characters": ({"spec.image": "a" * 513}, "spec.image", "Too long"),
    "image is empty": ({"spec.image": ""}, "spec.image", "at least 1 chars"),
    "suspend is a word": ({"spec.suspend": "later"}, "spec.suspend", "must be of type boolean"),
    "deadline 0": ({"spec.activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds", f"{LOW} 1"),
    "deadline beyond 31 bits": ({"spec.activeDeadlineSeconds": 2**31}, "spec.activeDeadlineSeconds", HIGH),
    "pending deadline 0": ({"spec.pendingDeadlineSeconds": 0}, "spec.pendingDeadlineSeconds", f"{LOW} 1"),
    "progress deadline 0": ({"spec.progressDeadlineSeconds": 0}, "spec.progressDeadlineSeconds", f"{LOW} 1"),
    "negative time to live": ({"spec.ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished", LOW),
    "negative backoff limit": ({"spec.backoffLimit": -1}, "spec.backoffLimit", f"{LOW} 0"),
    "backoff limit 10001": ({"spec.infrastructureBackoffLimit": 10_001}, "infrastructureBackoffLimit", HIGH),
    "no grace": ({"spec.terminationGracePeriodSeconds": 0}, "spec.terminationGracePeriodSeconds", f"{LOW} 1"),
    "grace of two days": ({"spec.terminationGracePeriodSeconds": 172_800}, "terminationGracePeriodSeconds", HIGH),
}
"""What is wrong with a job: the fields changed, the path of the fault, a phrase of the API server's message."""
# fmt: on


@pytest.mark.parametrize(("fields", "path", "phrase"), BAD.values(), ids=BAD)
def test_a_bad_job_is_refused(fields: Object, path: str, phrase: str, client: Client, tmp_path: Path) -> None:
    """The API server names the field and what would be right; `qlora validate` refuses the same file there."""
    job = changed(MINIMAL, fields)
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job))
    told = io.StringIO()

    message = refusal(client, job)
    assert message is not None
    assert path in message
    assert phrase in message
    assert validate([str(file)], told) == INVALID
    assert path in told.getvalue()


@pytest.mark.parametrize("field", ["spec.workspace", "spec.model.source", "spec.dataset.source"])
def test_a_path_of_one_machine_is_for_the_command_alone(field: str, client: Client, tmp_path: Path) -> None:
    """The API server says what a cluster reads, and `qlora validate` that the file is for one machine."""
    job = changed(MINIMAL, {field: "/data/qlora"})
    file, told = tmp_path / "job.json", io.StringIO()
    file.write_text(json.dumps(job))

    message = refusal(client, job)
    assert message is not None
    assert "for `qlora run` alone: put what it names on a claim, and write pvc://CLAIM/PATH" in message
    assert validate([str(file)], told) == 0
    assert "on a cluster" in told.getvalue()


HEADINGS = {
    "no apiVersion": {"apiVersion": OMIT},
    "another version": {"apiVersion": "qlora.dev/v1"},
    "no kind": {"kind": OMIT},
    "kind in other capitals": {"kind": "QloraJob"},
    "no metadata": {"metadata": OMIT},
    "metadata is a string": {"metadata": "docs"},
    "name is a number": {"metadata.name": 7},
    "label is a number": {"metadata.labels": {"a": 1}},
    "annotation is a number": {"metadata.annotations": {"a": 1}},
}


@pytest.mark.parametrize("fields", HEADINGS.values(), ids=HEADINGS)
def test_an_object_that_is_no_job_at_all_is_refused(fields: Object, client: Client) -> None:
    """What the API server cannot even decode, in words of its own, `qlora validate` refuses, too."""
    job = changed(MINIMAL, fields)

    assert refusal(client, job) is not None
    with pytest.raises(InvalidJobError):
        parse_job(job)


# --- both judges, on objects that nobody thought of


def places(node: Schema, path: str) -> dict[str, Schema]:
    """Path -> schema of all fields below an object, itself included."""
    below = [places(child, f"{path}.{name}") for name, child in node.get("properties", {}).items()]
    return {path: node, **{inner: found for part in below for inner, found in part.items()}}


PLACES = places(job_schema()["properties"]["spec"], "spec")
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 0.5, 1.0, 1.5, 1e300, 2**31, 2**63, 10**30]),
    st.sampled_from(["", "A", "a b", "16Gi", "avx2", "pvc://c", "pvc://c/a/", "pvc://c/..", "a.io/b"]),
    st.sampled_from(
        ["hf://a/b", "hf://datasets/a/b", "hf://datasets/a/b/..", "s3://abc", "s3://abc/..", "main"]
    ),
    st.text(max_size=4).map(lambda text: text.encode("utf-8", "replace").decode()),
)
ANYTHING = (
    PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text("aA./-", max_size=5), PLAIN, max_size=3)
)


def edges(node: Schema) -> list[object]:
    """Values on both sides of each bound of a field, and the values that it names."""
    beside = [-1, 0, 1]
    numbers = [node[bound] + step for bound in ("minimum", "maximum") if bound in node for step in beside]
    lengths = [node[bound] + step for bound in ("minLength", "maxLength") if bound in node for step in beside]
    texts = [start + "a" * (length - len(start)) for start in ("", "pvc://c/") for length in lengths]
    return [*numbers, *texts, *node.get("enum", []), node.get("default")]


def values(path: str) -> st.SearchStrategy[object]:
    """What may be tried in a field."""
    return st.sampled_from(edges(PLACES[path])) | ANYTHING


CHANGES = st.lists(
    st.sampled_from(sorted(PLACES)).flatmap(lambda path: st.tuples(st.just(path), values(path))),
    min_size=1,
    max_size=3,
)


def put(job: Object, path: str, value: object) -> None:
    """Set a field, whatever stands on the way to it."""
    *parents, name = path.split(".")
    for parent in parents:
        if not isinstance(job.get(parent), dict):
            job[parent] = {}
        job = job[parent]
    job[name] = value


def agree(client: Client, job: Object) -> None:
    """Both accept the job, or both refuse it."""
    message = refusal(client, job)
    try:
        parse_job(job)
        faults = None
    except InvalidJobError as error:
        faults = str(error)
    assert (message is None) == (faults is None), f"API server: {message}; qlora validate: {faults}"


@settings(max_examples=200, deadline=None)
@given(changes=CHANGES, base=st.sampled_from(["minimal", "full"]))
def test_both_judges_agree(client: Client, changes: list[tuple[str, object]], base: str) -> None:
    """Whatever stands in the fields of spec, the API server and `qlora validate` give the same verdict."""
    job = sample(base)
    for path, value in changes:
        put(job, path, value)
    (read,) = read_documents(json.dumps(job).encode())
    agree(client, read)


QUANTITIES = st.from_regex(quantity.MEMORY_PATTERN, fullmatch=True) | st.sampled_from(
    ["64Mi", "63.99999Mi", "67108863.9", "67108863.9999999999", "64Ti", "64.000001Ti", "70368744177665"]
)


@settings(max_examples=100, deadline=None)
@given(memory=QUANTITIES)
def test_both_judges_agree_on_memory(client: Client, memory: str) -> None:
    """Quantities are compared alike, fractions of a byte included."""
    agree(client, changed(MINIMAL, {"spec.topology.memoryPerRank": memory}))
