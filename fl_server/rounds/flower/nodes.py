"""The devices as the SuperLink's nodes."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest

from fl_server.rounds.flower.clients import connect_control, lost_on_error


def list_nodes(address: str, ca_path: Path) -> dict[bytes, int]:
    """Return the registered nodes' ids by public key, PEM.

    Raises:
        SessionLostError: The SuperLink at `address` does not answer.
    """
    with lost_on_error("nodes cannot be listed"), connect_control(address, ca_path) as control:
        nodes = control.ListNodes(ListNodesRequest()).nodes_info
        return {node.public_key: node.node_id for node in nodes if not node.unregistered_at}


def register_nodes(address: str, ca_path: Path, public_keys: Mapping[str, bytes]) -> dict[str, int]:
    """Register the devices that are not yet, and return all their node ids by device id.

    Args:
        address: HOST:PORT of the SuperLink.
        ca_path: Its certificate authority, PEM.
        public_keys: NIST-curve public keys by device id, PEM or OpenSSH.

    Raises:
        SessionLostError: The SuperLink does not answer, or refuses a key.
        ValueError: A key cannot be read.
    """
    known = list_nodes(address, ca_path)
    node_ids = {}
    with lost_on_error("nodes cannot be registered"), connect_control(address, ca_path) as control:
        for device_id, key in public_keys.items():
            pem = _convert_to_pem(key)
            if pem not in known:
                known[pem] = control.RegisterNode(RegisterNodeRequest(public_key=pem, name=device_id)).node_id
            node_ids[device_id] = known[pem]
    return node_ids


def unregister_nodes(address: str, ca_path: Path, node_ids: Iterable[int]) -> None:
    """Exclude nodes from now on; those that are not registered are left alone.

    Raises:
        SessionLostError: The SuperLink at `address` does not answer.
    """
    registered = set(list_nodes(address, ca_path).values())
    with lost_on_error("nodes cannot be unregistered"), connect_control(address, ca_path) as control:
        for node_id in registered.intersection(node_ids):
            control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))


def unregister_others(address: str, ca_path: Path, public_keys: Iterable[bytes]) -> None:
    """Exclude every node whose key is none of `public_keys`, as that of a device that was given another key is.

    Raises:
        SessionLostError: The SuperLink at `address` does not answer.
        ValueError: A key cannot be read.
    """
    wanted = {_convert_to_pem(key) for key in public_keys}
    unregister_nodes(
        address, ca_path, [node for key, node in list_nodes(address, ca_path).items() if key not in wanted]
    )


def _convert_to_pem(key: bytes) -> bytes:
    public_key = load_pem_public_key(key) if key.lstrip().startswith(b"-----") else load_ssh_public_key(key)
    return public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
