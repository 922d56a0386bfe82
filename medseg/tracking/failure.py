"""What may be told about a failure outside this machine.

Messages of exceptions carry paths, and paths of scans carry names of patients. The whole text stays in the run's
folder; what goes to MLflow keeps places in the code and below the workspace, and drops every other path.
"""

import re
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path

_MAX_CAUSE = 500
_KEPT = ("<workspace>/", "<medseg>/", "<flows>/", "<python>/", "models:/")
_SCAN_NAME = re.compile(
    r"[^\s'\"<>/]+\.(?:nii\.gz|nii|dcm|dicom|png|jpe?g|tiff?|mha|mhd|nrrd|zip|tar|tgz|gz)\b", re.IGNORECASE
)
_QUOTED_PATH = re.compile(r"(?P<quote>['\"])(?P<path>[^'\"]*[/\\][^'\"]*)(?P=quote)")
# An unquoted path may hold blanks, so what follows it goes too, up to the end of the clause.
_BARE_PATH = re.compile(r"(?P<path>[^\s'\"(]*[/\\][^\s'\"]*)(?P<rest>.*?)(?=; |: |$)")


@dataclass(frozen=True)
class Failure:
    """Why a run ended: `cause` in one line and `details`, both free of paths; `full` as Python prints it."""

    cause: str
    details: str
    full: str


def describe_failure(error: BaseException, workspace: Path) -> Failure:
    """Describe an exception with the chain of its causes."""
    message = " ".join(str(error).split())
    cause = f"{type(error).__name__}: {message}" if message else type(error).__name__
    chain = traceback.TracebackException.from_exception(error)
    return Failure(scrub(cause, workspace)[:_MAX_CAUSE], _details(chain, workspace), "".join(chain.format()))


def scrub(text: str, workspace: Path) -> str:
    """Drop paths and names of image files; a path below the workspace or the code keeps its tail."""
    return "\n".join(_scrub_line(line) for line in _shorten(text, workspace).splitlines())


def _shorten(text: str, workspace: Path) -> str:
    package = Path(__file__).resolve().parents[1]
    installed = sysconfig.get_paths()
    roots = {str(workspace): "<workspace>", str(package): "<medseg>", str(package.parent / "flows"): "<flows>"}
    roots |= {installed[kind]: "<python>" for kind in ("purelib", "platlib", "stdlib")}
    for root in sorted(roots, key=len, reverse=True):
        text = text.replace(f"{root}/", f"{roots[root]}/")
    return text


def _scrub_line(line: str) -> str:
    line = _QUOTED_PATH.sub(_drop_quoted, line)
    line = _BARE_PATH.sub(_drop_bare, line)
    return _SCAN_NAME.sub("<file>", line)


def _drop_quoted(found: "re.Match[str]") -> str:
    return found[0] if found["path"].startswith(_KEPT) else "<path>"


def _drop_bare(found: "re.Match[str]") -> str:
    if found["path"].startswith(_KEPT):
        return found["path"] + _BARE_PATH.sub(_drop_bare, found["rest"])
    return "<path>"


def _details(chain: traceback.TracebackException, workspace: Path) -> str:
    """The traceback, causes first: frames are code and keep their lines, messages are scrubbed."""
    earlier = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    parts = [_details(earlier, workspace), "which led to:"] if earlier else []
    frames = _shorten("".join(chain.stack.format()), workspace).splitlines()
    parts += [_QUOTED_PATH.sub(_drop_quoted, line) if line.startswith('  File "') else line for line in frames]
    return "\n".join([*parts, scrub("".join(chain.format_exception_only()), workspace)])
