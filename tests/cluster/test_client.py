"""What the API server refuses, and what does not answer, are errors that say so."""

import socket
from pathlib import Path

import pytest

from testcluster import kubeconfig
from testcluster.client import STRATEGIC_PATCH, ApiError, Client
from testcluster.cluster import Cluster


@pytest.mark.cluster
def test_objects_are_made_changed_and_deleted(api_cluster: Cluster, namespace: str) -> None:
    """post, get, patch, put and delete work on the path of an object."""
    client = api_cluster.client
    path = f"/api/v1/namespaces/{namespace}/configmaps"

    client.post(path, {"metadata": {"name": "c"}, "data": {"a": "1"}})
    merged = client.patch(f"{path}/c", {"data": {"b": "2"}})
    strategic = client.patch(f"{path}/c", {"data": {"a": None}}, STRATEGIC_PATCH)
    replaced = client.put(f"{path}/c", {**strategic, "data": {"c": "3"}})
    client.delete(f"{path}/c")

    assert merged["data"] == {"a": "1", "b": "2"}
    assert strategic["data"] == {"b": "2"}
    assert replaced["data"] == {"c": "3"}
    assert "c" not in [each["metadata"]["name"] for each in client.items(path)]


@pytest.mark.cluster
def test_a_refusal_has_its_code_reason_and_message(api_cluster: Cluster, namespace: str) -> None:
    """The fields of the API's Status object are the error's."""
    with pytest.raises(ApiError) as error:
        api_cluster.client.get(f"/api/v1/namespaces/{namespace}/configmaps/absent")

    assert (error.value.code, error.value.reason) == (404, "NotFound")
    assert error.value.message == 'configmaps "absent" not found'


@pytest.mark.parametrize("listens", [False, True], ids=["refused", "silent"])
def test_a_server_that_does_not_answer_is_an_error(tmp_path: Path, listens: bool) -> None:
    """A refused or silent connection is an ApiError with code 0, after the client's seconds at most."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not listens:
            server.close()
        config = kubeconfig.with_token({"server": f"http://127.0.0.1:{port}"}, "t")

        client = Client(kubeconfig.write(tmp_path / "config", config), seconds=0.1)

        with pytest.raises(ApiError) as error:
            client.get("/api/v1/namespaces")
    assert error.value.code == 0
