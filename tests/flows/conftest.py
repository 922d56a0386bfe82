import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("PREFECT_HOME", tempfile.mkdtemp(prefix="medseg-prefect-"))  # before it is imported


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[Path]:
    """A temporary Prefect server; its database."""
    from prefect.settings import get_current_settings
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=240):
        address = get_current_settings().server.database.connection_url
        assert address is not None
        yield Path(address.get_secret_value().rpartition(":///")[2])
