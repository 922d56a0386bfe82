"""A PACS on loopback: Orthanc with its DICOMweb plugin, in a temporary folder, with a password."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from medseg.ingest.dicom_write import write_series
from medseg.volume import Volume

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
PROGRAM = shutil.which("Orthanc")
INSTALLED = PROGRAM is not None and PLUGIN.is_file()
USER, PASSWORD = "tester", "not-a-secret"


class Orthanc:
    """A running server; `url` is its DICOMweb address without a query."""

    def __init__(self, port: int) -> None:
        self.url = f"dicomweb://127.0.0.1:{port}/dicom-web"
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", auth=(USER, PASSWORD), trust_env=False)

    def send(self, *files: Path) -> None:
        for file in files:
            self.http.post("/instances", content=file.read_bytes()).raise_for_status()

    def send_series(self, folder: Path, patient: str, seed: str = "", value: int = 100) -> list[Path]:
        """Make a small MR series with a bright box and store it."""
        array = (np.indices((24, 20, 8)).sum(0) % 17).astype(np.int16)
        array[3:9, 8:16, 2:6] = value
        volume = Volume(array, np.diag([1.0, 1.0, 2.0, 1.0]))
        files = write_series(volume, folder, patient_id=patient, seed_uid=seed)
        self.send(*files)
        return files

    def modalities(self) -> list[str]:
        """Modality of every series held."""
        series = self.http.get("/series?expand").json()
        return sorted(one["MainDicomTags"]["Modality"] for one in series)


@contextmanager
def running_orthanc(folder: Path) -> Iterator[Orthanc]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "Name": "medseg-test",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(PLUGIN)],
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([str(PROGRAM), str(folder / "orthanc.json")], stdout=log, stderr=log, env=os.environ)
    server = Orthanc(port)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                server.http.get("/dicom-web/studies").raise_for_status()
                break
            except httpx.HTTPError:
                alive = process.poll() is None and time.monotonic() < deadline
                assert alive, (folder / "log").read_text()
                time.sleep(0.1)
        yield server
    finally:
        server.http.close()
        process.terminate()
        process.wait(30)
