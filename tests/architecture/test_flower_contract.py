"""What node.py and flower/ use of Flower's internals: a Flower release that moves them fails here first."""

import importlib
import inspect
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from fl_server.rounds.superlink_command import superlink_command

SIGNATURES = {
    "flwr.cli.build:build_fab_from_files": ["files"],
    "flwr.common.serde:fab_to_proto": ["fab"],
    "flwr.common.serde:message_from_proto": ["message_proto"],
    "flwr.common.serde:message_to_proto": ["message"],
    "flwr.supercore.fab:Fab": ["hash_str", "content", "verifications"],
    "flwr.supercore.heartbeat:HeartbeatSender": ["heartbeat_fn"],
    "flwr.supercore.inflatable.inflatable_object:get_object_id": ["object_content"],
    "flwr.supercore.interceptors:RuntimeTokenHttpInterceptor": ["token"],
    "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor": ["component_name"],
    "flwr.supercore.primitives.asymmetric:public_key_to_bytes": ["public_key"],
    "flwr.supercore.retry:exponential": ["base_delay", "multiplier", "max_delay"],
    "flwr.supernode.fleet_http_client:FleetHttpClient": [
        "base_url",
        "interceptors",
        "verify",
        "timeout",
        "retry_invoker",
    ],
    "flwr.supernode.node_auth_http_interceptor:NodeAuthHttpInterceptor": ["private_key", "public_key"],
}

PARAMETERS = {
    "flwr.app:Message": {"ttl", "reply_to"},
    "flwr.supercore.interceptors:SuperExecAuthHttpInterceptor": {"master_secret", "protected_methods"},
    "flwr.supercore.retry:RetryInvoker": {
        "wait_gen_factory",
        "recoverable_exceptions",
        "max_tries",
        "max_time",
        "should_giveup",
    },
}

METHODS = {
    "flwr.app:ConfigRecord": ["deflate", "inflate"],
    "flwr.app:Message": ["object_id"],
    "flwr.supercore.control.control_http_client:ControlHttpClient": [
        "ListNodes",
        "RegisterNode",
        "UnregisterNode",
        "StartRun",
        "StopRun",
        "from_server_address",
    ],
    "flwr.supercore.runtime:RuntimeHttpClient": [
        "AcquireTask",
        "ConfirmMessageReceived",
        "GetNodes",
        "PullMessages",
        "PullObject",
        "PullTaskInput",
        "PushMessages",
        "PushObject",
        "SendTaskHeartbeat",
        "from_server_address",
    ],
    "flwr.supernode.fleet_http_client:FleetHttpClient": [
        "ActivateNode",
        "DeactivateNode",
        "PullMessages",
        "PullObject",
        "PushMessages",
        "PushObject",
        "SendNodeHeartbeat",
        "close",
    ],
    "flwr.supercore.heartbeat:HeartbeatSender": ["is_running", "start", "stop"],
}

FIELDS = {
    "flwr.proto.control_pb2:ListNodesResponse": {"nodes_info"},
    "flwr.proto.control_pb2:RegisterNodeRequest": {"public_key", "name"},
    "flwr.proto.control_pb2:UnregisterNodeRequest": {"node_id"},
    "flwr.proto.control_pb2:StartRunRequest": {"fab", "federation"},
    "flwr.proto.control_pb2:StopRunRequest": {"run_id"},
    "flwr.proto.fleet_pb2:ActivateNodeRequest": {"public_key", "heartbeat_interval"},
    "flwr.proto.fleet_pb2:DeactivateNodeRequest": {"node_id"},
    "flwr.proto.fleet_pb2:PullMessagesResponse": {"messages_list", "message_object_trees"},
    "flwr.proto.fleet_pb2:PushMessagesRequest": {
        "node",
        "messages_list",
        "message_object_trees",
        "clientapp_runtime_list",
    },
    "flwr.proto.fleet_pb2:PushMessagesResponse": {"objects_to_push", "session_id"},
    "flwr.proto.heartbeat_pb2:SendNodeHeartbeatRequest": {"node", "heartbeat_interval"},
    "flwr.proto.message_pb2:ConfirmMessageReceivedRequest": {"node", "message_object_id"},
    "flwr.proto.message_pb2:Message": {"metadata", "error"},
    "flwr.proto.message_pb2:Metadata": {"message_id", "reply_to_message_id"},
    "flwr.proto.message_pb2:ObjectTree": {"object_id", "children"},
    "flwr.proto.message_pb2:PullObjectRequest": {"node", "run_id", "object_id"},
    "flwr.proto.message_pb2:PullObjectResponse": {"object_found", "object_available", "object_content"},
    "flwr.proto.message_pb2:PushObjectRequest": {"node", "run_id", "object_id", "object_content", "session_id"},
    "flwr.proto.message_pb2:PushObjectResponse": {"stored"},
    "flwr.proto.node_pb2:NodeInfo": {"node_id", "public_key", "unregistered_at"},
    "flwr.proto.runtime_pb2:AcquireTaskRequest": {"supported_task_types"},
    "flwr.proto.runtime_pb2:AcquireTaskResponse": {"task", "token"},
    "flwr.proto.runtime_pb2:GetNodesResponse": {"nodes"},
    "flwr.proto.runtime_pb2:PullAppMessagesRequest": {"message_ids"},
    "flwr.proto.runtime_pb2:PullAppMessagesResponse": {"messages_list", "message_object_trees"},
    "flwr.proto.runtime_pb2:PullTaskInputResponse": {"task_id", "run", "context"},
    "flwr.proto.runtime_pb2:PushAppMessagesRequest": {"messages_list", "message_object_trees"},
    "flwr.proto.runtime_pb2:PushAppMessagesResponse": {"message_ids", "objects_to_push", "session_id"},
}

CONSTANTS = {
    "flwr.common.constant:SUPERLINK_NODE_ID": 1,
    "flwr.common.constant:HEARTBEAT_DEFAULT_INTERVAL": 30,
    "flwr.common.constant:HEARTBEAT_PATIENCE": 2,
}


def load(reference: str) -> object:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


def test_flower_is_the_release_that_was_read():
    assert version("flwr") == "1.41.0"


@pytest.mark.parametrize("reference", SIGNATURES)
def test_flower_function_takes_exactly_what_it_took(reference):
    assert list(inspect.signature(load(reference)).parameters) == SIGNATURES[reference]


@pytest.mark.parametrize("reference", PARAMETERS)
def test_flower_class_still_takes_the_arguments_used(reference):
    assert PARAMETERS[reference] <= set(inspect.signature(load(reference)).parameters)


@pytest.mark.parametrize("reference", METHODS)
def test_flower_client_still_has_the_methods_used(reference):
    assert [name for name in METHODS[reference] if not hasattr(load(reference), name)] == []


@pytest.mark.parametrize("reference", FIELDS)
def test_flower_message_still_has_the_fields_used(reference):
    assert FIELDS[reference] <= {field.name for field in load(reference).DESCRIPTOR.fields}


@pytest.mark.parametrize("reference", CONSTANTS)
def test_flower_constant_is_what_it_was(reference):
    assert load(reference) == CONSTANTS[reference]


def test_flower_identity_and_task_types_have_the_names_used():
    identity = load("flwr.supercore.task_identity:TaskIdentity")
    assert all(hasattr(type(identity), name) for name in ("task_id", "run_id", "node_id"))
    assert load("flwr.supercore.constant:TaskType").SERVER_APP


def test_flower_client_raises_the_errors_of_httpx():
    client = load("flwr.supernode.fleet_http_client:FleetHttpClient")("http://127.0.0.1:1")
    with pytest.raises(httpx.TransportError):
        client.PullMessages(load("flwr.proto.fleet_pb2:PullMessagesRequest")())
    client.close()


def test_flower_superlink_still_knows_the_options_used(tmp_path):
    command = superlink_command(
        host="127.0.0.1",
        port=1,
        database_path=tmp_path / "flwr.db",
        ca_path=tmp_path / "ca",
        certificate_path=tmp_path / "certificate",
        key_path=tmp_path / "key",
        superexec_secret_path=tmp_path / "secret",
    )
    assert Path(command.arguments[0]).exists()
    parser = load("flwr.superlink.cli.flower_superlink:_parse_args_run_superlink")()
    parsed = parser.parse_args(command.arguments[1:])
    assert (parsed.isolation, parsed.enable_supernode_auth) == ("process", True)
    assert parsed.superexec_auth_secret_file == str(tmp_path / "secret")
