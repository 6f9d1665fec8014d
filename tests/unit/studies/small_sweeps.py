"""Fixtures of the tests of sweeps: a ladder of small models with their data, and the tool run on them."""

import csv

import pytest
import yaml

from laver_megatron.config.command_line import load_config
from laver_megatron.data.index.opening import open_indexes
from laver_megatron.demo.make import make_demo
from laver_megatron.shards.subset import write_subset
from laver_megatron.studies import sweep_command

SIZES = ["16x1", "32x2"]
BASE = {
    "seq_length": 256, "visual_seq_length": 128, "micro_batch_size": 2, "global_batch_size": 4, "num_workers": 0,
    "lr": 4e-3, "eval_interval": 100, "eval_iters": 1, "vision_head_hidden_size": 32, "preset": "paper",
}  # fmt: skip


@pytest.fixture(scope="module")
def ladder(demo_dir, tmp_path_factory):
    """The demo with two more sizes, two nested subsets and one of another seed."""
    place = tmp_path_factory.mktemp("ladder")
    for part in ("model", "encoder", "shards"):
        (place / part).symlink_to(demo_dir / part)
    make_demo(place, models=SIZES)
    (index,) = open_indexes([str(demo_dir / "shards" / "train-*.tar")])
    for number, seed in ((40, 1), (80, 1), (80, 2)):
        write_subset(index, number, seed, place / f"subset-{number}-{seed}.parquet")
    return place


@pytest.fixture
def sweep(ladder, tmp_path, capsys):
    """Runs the tool: `sweep("--tokens", "1e4")` is the exit code; `.runs` are the manifest's lines by name."""

    class Sweep:
        output = tmp_path / "sweep"
        base = {
            **BASE, "encoder": str(ladder / "encoder"), "data_path": str(ladder / "shards" / "train-*.tar"),
            "valid_data_path": str(ladder / "shards" / "valid-*.tar"),
        }  # fmt: skip
        models = [str(ladder / f"model_{size}") for size in SIZES]

        def __call__(self, *arguments):
            (tmp_path / "base.yaml").write_text(yaml.safe_dump(self.base))
            fixed = ["--base", tmp_path / "base.yaml", "--models", *self.models, "--output", self.output]
            status = run_tool(*fixed, *arguments)
            said = capsys.readouterr()
            self.out, self.err = said.out, said.err
            return status

        @property
        def runs(self):
            with (self.output / "manifest.csv").open() as file:
                return {line["name"]: line for line in csv.DictReader(file)}

        def config(self, name):
            return load_config(["--config", str(self.output / "configs" / f"{name}.yaml")])

    return Sweep()


def run_tool(*arguments):
    try:
        sweep_command.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0
