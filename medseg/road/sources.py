"""Sources as paths, whether they are folders, files, addresses of a PACS or lists of these."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medseg.files import UserError


@contextmanager
def at_hand(sources: Sequence[str], workspace: Path) -> Iterator[list[Path]]:
    """The sources as paths. What an address asks for is fetched first, and removed once it has been used.

    `@FILE` stands for the sources that the lines of a text file name, which so stay out of Prefect's parameters.
    """
    from medseg.ingest import pacs
    from medseg.ingest.pseudonyms import load_key

    sources = [source for given in sources for source in _listed(given)]
    asked = [source for source in sources if pacs.is_address(source)]
    paths = {source: Path(source) for source in sources if source not in asked}
    for path in paths.values():
        if not path.exists() and "://" not in str(path):
            raise UserError(f"{path} does not exist; check the path of the scans.")
    for url in asked:
        paths[url] = pacs.fetch(url, workspace / "spool", load_key(workspace / "pseudonym.key"))
    yield [paths[source] for source in sources]
    for url in asked:  # not after an error: what has come is kept for the next attempt
        pacs.remove_spool(paths[url])


def _listed(source: str) -> list[str]:
    if not source.startswith("@"):
        return [source]
    try:
        lines = Path(source[1:]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list {source[1:]} cannot be read ({error}); give a UTF-8 text file.") from error
    if not (listed := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"the list {source[1:]} is empty; write one folder, file or address a line.")
    return listed
