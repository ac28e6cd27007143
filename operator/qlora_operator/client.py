"""Jobs of a cluster from Python, as typed objects.

    from qlora_operator.client import Client

    client = Client(namespace="team")
    client.create(job)
    print(client.wait("docs-assistant").status.adapter.uri)

Needs what pip installs with `qlora-operator[client]`. Who may do what is the cluster's matter: the client has the
permissions of its kubeconfig, or of the service account of the pod that it is in.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kubernetes import client as kubernetes_client
from kubernetes import config, watch
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError

from qlora_operator.api import names
from qlora_operator.api.loader import parse_api_object
from qlora_operator.api.status import QLoRAJobStatus
from qlora_operator.api.v1alpha1 import QLoRAJob
from qlora_operator.errors import CommandError, InvalidJobError

DEFAULT_NAMESPACE = "default"
POLL_SECONDS = 2.0
"""Between two looks at a job that is waited for."""
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
FINISHED = names.ConditionType.FINISHED


class ClusterError(CommandError):
    """The cluster refused a request, could not be reached, or its configuration cannot be read."""


class WaitTimeoutError(ClusterError):
    """What was waited for did not happen in time."""


class Client:
    """QLoRAJobs of a cluster."""

    def __init__(
        self, *, kubeconfig: str | None = None, context: str | None = None, namespace: str | None = None
    ) -> None:
        """Read the configuration; no request is sent.

        Args:
            kubeconfig: path of a kubeconfig; None: that of $KUBECONFIG, else ~/.kube/config, else the pod's own service
                account.
            context: of the kubeconfig; None: its current one.
            namespace: of jobs that name none; None: the context's, else `default`.

        Raises:
            ClusterError: there is no configuration that can be read.
        """
        settings = kubernetes_client.Configuration()
        try:
            configured = _load(settings, kubeconfig, context)
        except (ConfigException, OSError, ValueError, TypeError) as error:
            raise ClusterError(f"no configuration of a cluster can be read: {error}") from error
        self.namespace = namespace or configured or DEFAULT_NAMESPACE
        """Of jobs that name none."""
        self._api = kubernetes_client.ApiClient(settings)
        self._custom = kubernetes_client.CustomObjectsApi(self._api)
        self._batch = kubernetes_client.BatchV1Api(self._api)
        self.core = kubernetes_client.CoreV1Api(self._api)
        """The cluster's other objects."""

    def create(self, job: QLoRAJob) -> QLoRAJob:
        """Create a job; as it then is. Raises ClusterError."""
        body = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
        body.pop("status", None)
        namespace = job.metadata.namespace or self.namespace
        return _job(_call(lambda: self._custom.create_namespaced_custom_object(*_kind(namespace), body)))

    def get(self, name: str) -> QLoRAJob:
        """A job. Raises ClusterError, also for one that this release cannot read."""
        return _job(self.raw(name))

    def raw(self, name: str) -> dict[str, Any]:
        """A job as the API has it. Raises ClusterError."""
        found: dict[str, Any] = _call(
            lambda: self._custom.get_namespaced_custom_object(*_kind(self.namespace), name)
        )
        return found

    def jobs(self, *, all_namespaces: bool = False) -> list[QLoRAJob]:
        """The jobs of the namespace, or of all; those that this release cannot read are left out.

        Raises:
            ClusterError: they cannot be listed.
        """
        if all_namespaces:
            group, version, plural = names.GROUP, names.VERSION, names.PLURAL
            found = _call(lambda: self._custom.list_cluster_custom_object(group, version, plural))
        else:
            found = _call(lambda: self._custom.list_namespaced_custom_object(*_kind(self.namespace)))
        jobs = []
        for raw in found["items"]:
            try:
                jobs.append(parse_api_object({"apiVersion": names.API_VERSION, "kind": names.KIND, **raw})[0])
            except ValueError:
                continue
        return jobs

    def status(self, name: str) -> QLoRAJobStatus:
        """What the operator says of a job; empty until it has seen it. Raises ClusterError."""
        return self.get(name).status or QLoRAJobStatus()

    def wait(self, name: str, condition: str = FINISHED, timeout: float | None = None) -> QLoRAJob:
        """Wait until a condition of a job is true; the job as it then is.

        A job that has finished without it will not get it: that ends the wait, too.

        Args:
            name: of the job.
            condition: such as Finished, Running or Suspended.
            timeout: seconds; None: as long as it takes.

        Raises:
            WaitTimeoutError: it did not become true in time.
            ClusterError: the job has finished without it, is gone, or cannot be read.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            job = self.get(name)
            if has_condition(job, condition):
                return job
            message = (job.status.message if job.status else None) or "the operator has not looked at it yet"
            if has_condition(job, FINISHED):
                raise ClusterError(f"{name} has finished and is not {condition}: {message}")
            if deadline is not None and time.monotonic() > deadline:
                raise WaitTimeoutError(f"{name} is not {condition} after {timeout:g} s: {message}")
            time.sleep(
                POLL_SECONDS
                if deadline is None
                else min(POLL_SECONDS, max(0.01, deadline - time.monotonic()))
            )

    def suspend(self, name: str) -> QLoRAJob:
        """Have the job's pods stop after a checkpoint. Raises ClusterError."""
        return self._set_suspend(name, suspend=True)

    def resume(self, name: str) -> QLoRAJob:
        """Have it continue from the newest checkpoint. Raises ClusterError."""
        return self._set_suspend(name, suspend=False)

    def restart(self, name: str, timeout: float | None = None) -> QLoRAJob:
        """Suspend a job, wait until its pods have stopped, and resume it: new pods continue from its checkpoint.

        Raises:
            ClusterError: the job has finished; a finished one is created anew under another name.
            WaitTimeoutError: its pods did not stop in time; it stays suspended.
        """
        if has_condition(self.get(name), FINISHED):
            raise ClusterError(f"{name} has finished, so there is nothing to restart: create another job")
        self.suspend(name)
        deadline = None if timeout is None else time.monotonic() + timeout
        while (job := self.get(name)) and not stopped(job):
            if has_condition(job, FINISHED):
                raise ClusterError(f"{name} finished before it was suspended")
            if deadline is not None and time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"the pods of {name} have not stopped after {timeout:g} s; it stays suspended until it is resumed"
                )
            time.sleep(POLL_SECONDS / 4)
        return self.resume(name)

    def cancel(self, name: str) -> None:
        """Delete a job and its pods; what it has written to its workspace stays. Raises ClusterError."""
        _call(
            lambda: self._custom.delete_namespaced_custom_object(
                *_kind(self.namespace), name, propagation_policy="Foreground"
            )
        )

    def logs(
        self, name: str, *, follow: bool = False, index: int = 0, attempt: int | None = None
    ) -> Iterator[str]:
        """The lines of a pod's log; pod 0 has rank 0.

        Args:
            name: of the job.
            follow: wait for more lines until the pod ends.
            index: of the pod within its attempt.
            attempt: None: the newest that has such a pod.

        Raises:
            ClusterError: there is no such pod, or its log cannot be read.
        """
        yield from self.pod_log(self.pod(name, index=index, attempt=attempt), follow=follow)

    def pod_log(self, pod: str, *, follow: bool) -> Iterator[str]:
        """The lines of the trainer's log in a pod. Raises ClusterError when it cannot be read."""
        arguments = {"container": names.TRAINER_CONTAINER}
        if follow:
            try:
                yield from watch.Watch().stream(
                    self.core.read_namespaced_pod_log, pod, self.namespace, **arguments
                )
            except (ApiException, HTTPError) as error:
                raise _error(error) from error
            return
        text = _call(lambda: self.core.read_namespaced_pod_log(pod, self.namespace, **arguments))
        yield from text.rstrip("\n").split("\n") if text else ()

    def pod(self, name: str, *, index: int = 0, attempt: int | None = None) -> str:
        """The name of a job's pod; arguments and errors as of `logs`."""
        uid = self.raw(name)["metadata"]["uid"]
        selector = f"{names.JOB_UID_LABEL}={uid},{INDEX_LABEL}={index}"
        if attempt is not None:
            selector += f",{names.ATTEMPT_LABEL}={attempt}"
        pods = _call(lambda: self.core.list_namespaced_pod(self.namespace, label_selector=selector)).items
        if not pods:
            which = f"pod {index}" + ("" if attempt is None else f" of attempt {attempt}")
            raise ClusterError(
                f"{name} has no {which}, or it is gone: {self.status(name).message or 'no message'}"
            )
        newest = max(pods, key=lambda pod: int(pod.metadata.labels.get(names.ATTEMPT_LABEL, 0)))
        return str(newest.metadata.name)

    def training_template(self, name: str) -> tuple[QLoRAJob, dict[str, Any]]:
        """A job, and the pod template of its newest attempt that trains, as the operator made it.

        Raises:
            ClusterError: there was none yet, or it is gone.
        """
        job = self.get(name)
        selector = f"{names.JOB_UID_LABEL}={job.metadata.uid},{names.ROLE_LABEL}={names.Role.TRAINER.value}"
        found = _call(lambda: self._batch.list_namespaced_job(self.namespace, label_selector=selector)).items
        if not found:
            if job.status is None or all(attempt.stage != "train" for attempt in job.status.attempts):
                raise ClusterError(f"{name} has not trained yet, so there is no model of it")
            raise ClusterError(
                f"no Job of {name} that trained is left, which a pod could be made after: a suspended job has none "
                "until it is resumed"
            )
        newest = max(found, key=lambda child: int(child.metadata.labels.get(names.ATTEMPT_LABEL, 0)))
        template: dict[str, Any] = self._api.sanitize_for_serialization(newest.spec.template)
        return job, template

    def tell_exported(self, name: str, forms: Sequence[str]) -> QLoRAJob:
        """Say at a finished job which forms were made of its adapter, besides those that are known: the operator takes
        them over into the status. Raises ClusterError."""
        said = self.get(name).metadata.annotations.get(names.EXPORTED_ANNOTATION, "").split(",")
        every = dict.fromkeys(form for form in (*said, *forms) if form)
        annotations = {names.EXPORTED_ANNOTATION: ",".join(every)}
        patch = {"metadata": {"annotations": annotations}}
        return _job(
            _call(lambda: self._custom.patch_namespaced_custom_object(*_kind(self.namespace), name, patch))
        )

    def _set_suspend(self, name: str, *, suspend: bool) -> QLoRAJob:
        patch = {"spec": {"suspend": suspend}}
        return _job(
            _call(lambda: self._custom.patch_namespaced_custom_object(*_kind(self.namespace), name, patch))
        )


def has_condition(job: QLoRAJob, kind: str) -> bool:
    """Whether a condition of the job is true now, not of a spec of before."""
    status = job.status
    return status is not None and any(c.type == kind and c.status == "True" for c in status.conditions)


def stopped(job: QLoRAJob) -> bool:
    """Whether a job is suspended and its last attempt is over: no pod of it runs."""
    status = job.status
    if status is None or not has_condition(job, names.ConditionType.SUSPENDED):
        return False
    return not status.attempts or status.attempts[-1].end is not None


def _load(settings: Any, kubeconfig: str | None, context: str | None) -> str | None:
    """Read server and credentials; the namespace that goes with them, if one does."""
    try:
        contexts, active = config.list_kube_config_contexts(kubeconfig)
    except ConfigException:
        if kubeconfig is not None or context is not None:
            raise
        config.load_incluster_config(client_configuration=settings)
        return None
    config.load_kube_config(kubeconfig, context=context, client_configuration=settings)
    chosen = next((c for c in contexts if c["name"] == context), None) if context else active
    found = (chosen or {}).get("context", {}).get("namespace")
    return str(found) if found else None


def _kind(namespace: str) -> tuple[str, str, str, str]:
    return names.GROUP, names.VERSION, namespace, names.PLURAL


def _job(raw: dict[str, Any]) -> QLoRAJob:
    try:
        return parse_api_object(raw)[0]
    except (ValueError, InvalidJobError) as error:
        name = raw.get("metadata", {}).get("name")
        raise ClusterError(f"this release cannot read the job {name}: {error}") from error


def _call(request: Callable[[], Any]) -> Any:
    """What a request answers. Raises ClusterError."""
    try:
        return request()
    except (ApiException, HTTPError) as error:
        raise _error(error) from error


def _error(error: Exception) -> ClusterError:
    """A request's failure, in the API server's words."""
    if not isinstance(error, ApiException):
        return ClusterError(f"the API server cannot be reached: {error}")
    try:
        message = kubernetes_client.ApiClient().deserialize(error.body, "object", "application/json")[
            "message"
        ]
    except Exception:  # whatever is between us and the API server may have answered
        message = error.reason
    return ClusterError(str(message or f"the API server answered {error.status}"))
