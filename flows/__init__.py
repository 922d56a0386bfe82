"""Prefect around the steps of medseg; no algorithm here.

`flows.steps` has one flow for each step, `flows.road` the whole road, `flows.deployments` what `medseg deploy` does.
Each flow calls the same function in `medseg.road` as the command line does.

Importing this package settles what Prefect may do: it reports to nobody, and its own files lie in the workspace
(`<workspace>/prefect`, where `medseg up` keeps its server's), never in the home folder. What the environment says
already is left alone. With `PREFECT_API_URL` the flows report to that server; without, Prefect starts a temporary one
on the same database.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from medseg.files import default_workspace

SETTINGS = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",  # seconds; `flows.deployments` counts missed beats
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # its first start makes tables
}
"""Environment of every process that runs flows."""


def _settle() -> None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    home = Path(os.environ.setdefault("PREFECT_HOME", str(default_workspace() / "prefect")))
    with suppress(OSError):  # Prefect makes no parents; where this fails, it says so itself
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if "prefect" in sys.modules:  # it has read the environment already
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


_settle()
