"""medseg: from scans to reviewed results.

The road: ingest -> cohort -> plan -> train -> bundle -> predict -> masks and ledger -> report.
Nothing heavy is imported here; every room is imported by name (`from medseg.models import build_model`).
"""

import os

__version__ = "0.1.0"

# On a CPU torch takes large tensors from the system anew each time, and most of a layer's time can go into their 4 KiB
# pages. With this it asks for pages of 2 MiB, where Linux gives them. It is read when torch first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
