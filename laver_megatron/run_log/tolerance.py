"""Writing that a run can do without: what goes wrong with it is said, once of each kind, and the run goes on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()


@contextmanager
def tolerating(kind: str, place: Path | str, lost: str) -> Iterator[None]:
    """Around work that may fail.

    Args:
        kind: what is written. Its first failure at a place is said, later ones are not.
        place: where to.
        lost: what is missing because of the failure, and what becomes of it.
    """
    try:
        yield
    except Exception as error:  # also of libraries, whose errors are their own
        if (kind, str(place)) not in _said:
            _said.add((kind, str(place)))
            logger.warning("%s cannot be written to %s (%s); %s; the run goes on", kind, place, error, lost)
