"""A run of Flower is opened, and its one task claimed, by whoever drives it.

The app bundle that Flower wants for a run is empty, and no device ever fetches it.
"""

import fcntl
import hashlib
import time
from pathlib import Path

from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor

from fl_server.rounds.flower.clients import SessionLostError, connect_control, connect_runtime

CLAIM_MAX_S = 10.0
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_FAB_FILES: dict[str, bytes | Path] = {
    "pyproject.toml": b"""[project]
name = "edge-fl-rounds"
version = "1.0.0"
description = "Marks a run; holds no code that anything runs"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "edge-fl"
[tool.flwr.app.components]
serverapp = "nothing:app"
clientapp = "nothing:app"
""",
    "nothing.py": b'"""Left empty: devices run what was installed on them."""\n',
}


def open_run(address: str, ca_path: Path, secret_path: Path) -> str:
    """Return the token of the ServerApp task of a new run; raises SessionLostError."""
    secret = secret_path.read_bytes().strip()
    acquiring = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
    fab = build_fab_from_files(_FAB_FILES)[0]
    request = StartRunRequest(fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {})), federation="")
    with (
        secret_path.open("rb") as lock,
        connect_control(address, ca_path) as control,
        connect_runtime(address, ca_path, [acquiring], name="SuperExec") as executor,
    ):
        # AcquireTask gives the oldest task of any run: drivers must not claim each other's.
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_id = control.StartRun(request).run_id
        deadline = time.monotonic() + CLAIM_MAX_S
        while time.monotonic() < deadline:
            answer = executor.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if answer.HasField("task") and answer.task.run_id == run_id:
                return str(answer.token)
            time.sleep(0.05)
    raise SessionLostError(f"the SuperLink did not hand out the task of run {run_id} within {CLAIM_MAX_S:g} s")
