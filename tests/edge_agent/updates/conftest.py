from pathlib import Path

import pytest

from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.releases import ReleaseServer


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
def server(tmp_path: Path, broker: MemoryBroker) -> ReleaseServer:
    return ReleaseServer(tmp_path / "server", broker)
