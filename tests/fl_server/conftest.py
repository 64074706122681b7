from pathlib import Path

import pytest

from tests.simulators.federation import create_template


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation with a packaged first version; exported once, as that takes seconds."""
    directory = tmp_path_factory.mktemp("template") / "federation"
    create_template(directory)
    return directory
