"""One small encoder of every kind, made once."""

from collections.abc import Mapping
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Directories by kind. Read only."""
    from laver_megatron.demo.encoders import KINDS, save_encoder

    root = tmp_path_factory.mktemp("encoders")
    for kind in KINDS:
        save_encoder(root / kind, kind)
    return {kind: root / kind for kind in KINDS}
