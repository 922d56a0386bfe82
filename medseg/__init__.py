"""medseg: from scans to reviewed results.

The road: ingest -> cohort -> plan -> train -> bundle -> predict -> masks and ledger -> report.
Nothing heavy is imported here; every room is imported by name (`from medseg.models import build_model`).
"""

__version__ = "0.1.0"
