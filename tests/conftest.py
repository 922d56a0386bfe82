"""What every test starts from."""

import signal
from collections.abc import Callable, Iterator

import pytest

from medseg.ingest import pseudonyms

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores it, and so would its children
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def true_new_key() -> Iterator[Callable[[], str]]:
    """Every new workspace has one key: splits follow from the pseudonyms, and figures of small trainings from those."""
    true = pseudonyms._new_key
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pseudonyms, "_new_key", lambda: "5a" * 32)
        yield true
