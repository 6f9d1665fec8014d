"""Result folders as the kits wrote them (tests/data/scores/README.md)."""

import tarfile
from pathlib import Path

import pytest

ARCHIVE = Path(__file__).parents[2] / "data" / "scores" / "kits.tar.xz"


@pytest.fixture
def kits(tmp_path) -> Path:
    """A copy to change: lmms_eval/, vlmevalkit_tsv/ and vlmevalkit_xlsx/, each with baseline/ and laver/."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path
