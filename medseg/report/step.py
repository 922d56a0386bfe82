"""The step `report`: one self-contained HTML page from what lies in a folder."""

import time
from pathlib import Path

from medseg.config import ReportConfig
from medseg.files import UserError, write_text
from medseg.report import batch_page, cohort_page, comparison_page, run_page
from medseg.result import Result

PAGES = {
    "run.json": run_page.build,
    "ledger.csv": batch_page.build,
    "cohort.json": cohort_page.build,
    comparison_page.FILE: comparison_page.build,
}
"""The file that tells what a folder is, and who makes its page."""


def run(config: ReportConfig, folder: Path) -> Result:
    """Write `folder/report/index.html` for a run, a prediction folder, a cohort or a comparison.

    The page holds its pictures, styles and viewers and loads nothing; the overlays of a run's worst cases are also
    written as `evaluation/<split>/overlays/<case_id>.png`.

    Raises:
        UserError: the folder is none of these, or one of its tables is damaged.
    """
    started = time.monotonic()
    build = next((build for name, build in PAGES.items() if (folder / name).is_file()), None)
    if build is None:
        names = ", ".join(PAGES)
        raise UserError(f"{folder} has none of {names}; name a run, a prediction folder, a cohort or a comparison.")
    page = build(config, folder)
    path = write_text(folder / "report" / "index.html", page.html)
    figures = {**page.figures, "page_mb": round(path.stat().st_size / 1e6, 2)}
    figures["seconds"] = round(time.monotonic() - started, 2)
    return Result("report", "done", {"report": path}, figures).write(folder / "report")
