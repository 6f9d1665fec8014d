"""Making shards in the process of the test, and reading them with the plain webdataset library."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from laver_megatron.shards import MakeSettings, make_shards


@pytest.fixture
def make(tmp_path) -> Callable[..., dict]:
    """make(source, output="out", **settings) -> {key: {extension: bytes, or the parsed json}}, by webdataset."""

    def run(*sources: Path, output: str = "out", **settings) -> dict:
        folder = tmp_path / output
        defaults = {"max_bad_fraction": 0.0, "num_workers": 0}
        run.report = make_shards(MakeSettings(tuple(sources), folder, **{**defaults, **settings}))
        paths = [str(path) for path in sorted(folder.glob("*.tar"))]
        samples = {}
        for sample in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False):
            content = {name: value for name, value in sample.items() if not name.startswith("__")}
            assert sample["__key__"] not in samples
            samples[sample["__key__"]] = {**content, "json": json.loads(content["json"])}
        return samples

    return run
