"""Sweeps: what is planned, and bad input."""

from pathlib import Path

import pytest
import yaml

from laver_megatron.config.checks import check
from laver_megatron.config.command_line import Invocation
from laver_megatron.data.index.opening import open_indexes
from laver_megatron.run_log.run_summary import config_hash
from laver_megatron.shards.subset import write_subset
from laver_megatron.studies.sweep import nearest
from laver_megatron.studies.sweep_sizes import amount_label
from tests.unit.studies.small_sweeps import BASE, SIZES


def demo_model(sweep):
    return Path(sweep.base["encoder"]).parent / "model"


def test_every_combination_once(sweep):
    assert sweep("--iterations", "2", "3", "--seeds", "5", "6", "--lr-warmup-share", "0.34", "--clip-grad", "0.5") == 0
    assert len(sweep.runs) == 2 * 2 * 2 * 2
    assert sorted(path.stem for path in (sweep.output / "configs").iterdir()) == sorted(sweep.runs)
    for name, line in sweep.runs.items():
        config = sweep.config(name)
        assert (
            name == f"{line['model']}-iterations{config.training.train_iters}-{line['arm']}-seed{config.training.seed}"
        )
        assert config.objective.laver == (line["arm"] == "laver")
        assert Path(config.run.run_dir) == sweep.output / "runs" / name
        assert (config.start.load, config.training.clip_grad) == (
            f"hf:{sweep.models[0].replace('model_16x1', line['model'])}",
            0.5,
        )
        assert config.training.lr_warmup_iters == 1
        assert config_hash(config) == line["config_hash"]
        check(Invocation(config, dry_run=True, dry_run_world_size=int(line["num_gpus"])))
    costs = [int(line["flops"]) for line in sweep.runs.values()]
    assert costs == sorted(costs)
    assert "2 sizes; fitting a law needs 3" in sweep.err and "begins anew" not in sweep.err


def test_arms_differ_in_nothing_but_laver(sweep):
    assert sweep("--iterations", "2") == 0
    runs = sweep.runs
    for size in SIZES:
        laver, baseline = (f"model_{size}-iterations2-{arm}-seed1234" for arm in ("laver", "baseline"))
        one, other = (sweep.config(name).flat() for name in (laver, baseline))
        assert {key for key in one if one[key] != other[key]} == {"laver", "run_dir", "arm"}
        assert (sweep.config(laver).run.arm, sweep.config(baseline).run.arm) == ("laver", "baseline")
        assert runs[laver]["tokens"] == runs[baseline]["tokens"]
        overhead = int(runs[laver]["laver_overhead"])
        assert overhead > 0 == int(runs[baseline]["laver_overhead"])
        assert int(runs[laver]["flops"]) - overhead == int(runs[baseline]["flops"])
    assert "1 amount; fitting a law needs 3" in sweep.err


def test_sizes_may_differ_in_attention(sweep, tmp_path):
    """Each is planned with its own, also where the model is the same; a reader is told."""
    sweep.models = [tmp_path / f"{name}.yaml" for name in ("mixed", "causal")]
    for path in sweep.models:
        own = {**sweep.base, "load": f"hf:{demo_model(sweep)}", "attention": path.stem}
        path.write_text(yaml.safe_dump({**own, "run_dir": "x", "train_iters": 9}))
    assert sweep("--iterations", "2", "--arms", "baseline") == 0
    mixed, causal = (int(sweep.runs[f"{name}-iterations2-baseline-seed1234"]["flops"]) for name in ("mixed", "causal"))
    assert mixed > causal
    assert "the models' files also differ in attention" in sweep.err


def test_tokens_are_met_to_half_an_iteration(sweep):
    assert sweep("--tokens", "2000", "4e3", "--lr-exponent", "0.5") == 0
    assert {float(line["amount"]) for line in sweep.runs.values()} == {2000, 4000}
    for line in sweep.runs.values():
        per_iteration = int(line["tokens"]) / int(line["train_iters"])
        assert abs(int(line["tokens"]) - float(line["amount"])) < 0.6 * per_iteration
    rates, sizes = ({line["model"]: float(line[key]) for line in sweep.runs.values()} for key in ("lr", "N"))
    small, large = (f"model_{size}" for size in SIZES)
    assert rates[small] == BASE["lr"]
    assert rates[large] == pytest.approx(BASE["lr"] * (sizes[small] / sizes[large]) ** 0.5, rel=1e-3)


def test_a_budget_charges_the_overhead(sweep):
    assert sweep("--flops", "1e10", "2e10", "--max-epochs", "6") == 0
    runs = sweep.runs
    for size in SIZES:
        for amount in ("1e10", "2e10"):
            laver, plain = (runs[f"model_{size}-flops{amount}-{arm}-seed1234"] for arm in ("laver", "baseline"))
            assert int(laver["train_iters"]) < int(plain["train_iters"])
            for line in (laver, plain):
                per_iteration = int(line["flops"]) / int(line["train_iters"])
                assert abs(int(line["flops"]) - float(amount)) < 0.6 * per_iteration
    assert "whole iterations miss the amount" in sweep.err


def test_subsets_are_seen_once(sweep, ladder):
    subsets = [ladder / f"subset-{number}-1.parquet" for number in (40, 80)]
    assert sweep("--subsets", *subsets) == 0
    tokens = {}
    for name, line in sweep.runs.items():
        (path,) = sweep.config(name).data.data_path
        assert path == line["amount"] and 0.7 < float(line["epochs"]) <= 1
        tokens[path] = int(line["tokens"])
    small, large = (tokens[str(path)] for path in subsets)
    assert 1.6 < large / small < 2.4
    assert sweep.runs.keys() >= {"model_16x1-subset-40-1-laver-seed1234"}


def test_all_sizes_get_one_visual_budget(sweep, tmp_path):
    """Where the data propose it: divisible by every layout's ranks, so that all sizes read the same packs."""
    del sweep.base["visual_seq_length"]
    for size, ranks in zip(SIZES, (1, 2), strict=True):
        own = {**sweep.base, "load": f"hf:{sweep.models[0].replace('16x1', size)}", "tensor_model_parallel_size": ranks}
        (tmp_path / f"{size}.yaml").write_text(yaml.safe_dump({**own, "run_dir": "x", "train_iters": 9}))
    sweep.models = [tmp_path / f"{size}.yaml" for size in SIZES]
    assert sweep("--iterations", "2", "--num-gpus", "1", "4", "--gpus-per-node", "2") == 0
    budgets = {sweep.config(name).data.visual_seq_length for name in sweep.runs}
    assert len(budgets) == 1 and budgets.pop() % 2 == 0
    assert {(line["num_gpus"], line["num_nodes"]) for line in sweep.runs.values()} == {("1", "1"), ("4", "2")}
    submit = (sweep.output / "submit.sh").read_text()
    lines = {number: [] for number in (1, 2)}
    for place, line in enumerate(sweep.runs.values(), start=1):
        lines[int(line["num_nodes"])].append(str(place))
    for number, gpus in ((1, 1), (2, 2)):
        assert f"sbatch --nodes={number} --gpus-per-node={gpus} --array={','.join(lines[number])} " in submit


# --- bad input --------------------------------------------------------------------------------------


def refused(sweep, *arguments):
    """What the tool says; nothing has been written."""
    assert sweep(*arguments) == 2
    assert not sweep.output.exists() and not list(sweep.output.parent.glob(".sweep*"))
    return sweep.err


def test_more_than_the_data_hold(sweep):
    said = refused(sweep, "--tokens", "1e6", "--seeds", "1", "2")
    assert said.count("1e+06 tokens are more") == 2 and "-laver-seed1 and 3 more: " in said  # seeds have other packs
    said = refused(sweep, "--tokens", "1e6")
    assert said.count("1e+06 tokens are more") == 1 and " and 3 more: " in said  # the sizes and arms read the same
    assert "1e+06 tokens are more than 1 epoch of the data hold" in said and "--max-epochs" in said
    said = refused(sweep, "--flops", "1e15", "--arms", "laver")
    assert said.count("at most") == 2 and "FLOPs, more data" in said  # each size with its own number
    assert "500 iterations are more than 2 epochs" in refused(sweep, "--iterations", "500", "--max-epochs", "2")
    assert sweep("--tokens", "3e4", "--max-epochs", "4", "--arms", "baseline") == 0
    assert all(2 < float(line["epochs"]) < 4 for line in sweep.runs.values())
    assert "samples are seen again in 2 runs" in sweep.err


@pytest.mark.parametrize("flags", [("--max-epochs", "inf"), ("--max-epochs", "nan"), ("--lr-exponent", "nan")])
def test_numbers_that_are_none(sweep, flags):
    assert f"{flags[0]} is {flags[1]}, but must be finite" in refused(sweep, "--iterations", "2", *flags)


def test_less_than_one_iteration(sweep):
    assert "1e+06 FLOPs are less than one iteration" in refused(sweep, "--flops", "1e6")
    assert "10 tokens are less than one iteration" in refused(sweep, "--tokens", "10")


def test_the_same_run_twice(sweep, tmp_path):
    said = refused(sweep, "--tokens", "2000", "2001", "--arms", "laver")
    assert "model_16x1-tokens2000-laver-seed1234 and model_16x1-tokens2001-laver-seed1234 would be the same" in said
    assert said.count("would be the same") == 1 and "(as 1 more)" in said  # the other size
    assert "--tokens 2e3, 2000: all would be tokens2000 in the names" in refused(sweep, "--tokens", "2e3", "2000")
    assert "names 3 twice" in refused(sweep, "--iterations", "2", "--seeds", "3", "3")
    assert "--seeds -1: a seed must not be negative" in refused(sweep, "--iterations", "2", "--seeds", "3", "-1")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "model_16x1").symlink_to(sweep.models[0])
    sweep.models.append(str(tmp_path / "copy" / "model_16x1"))
    assert "two models have the name model_16x1" in refused(sweep, "--iterations", "2")


def test_what_the_runs_would_refuse(sweep):
    said = refused(sweep, "--iterations", "2", "3", "--lr-warmup-iters", "2")
    assert said.count("lr_warmup_iters 2 leaves nothing of 2 train_iters") == 1 and "and 3 more" in said
    assert "3 processes cannot be divided" not in refused(sweep, "--iterations", "2", "--num-gpus", "3")
    assert "not a multiple of micro_batch_size 2 x 3" in sweep.err
    assert "12 GPUs do not fill whole nodes of 8; use --num-gpus 16" in refused(
        sweep, "--iterations", "2", "--num-gpus", "12", "--global-batch-size", "24"
    )
    assert "--seed is the sweep's to set" in refused(sweep, "--iterations", "2", "--seed=3")
    assert "must be a positive integer" in refused(sweep, "--iterations", "2.5")
    assert "--learning" in refused(sweep, "--iterations", "2", "--learning", "1")
    del sweep.base["eval_interval"]
    assert "no validation loss to fit" in refused(sweep, "--iterations", "2")


def test_what_is_there_is_not_touched(sweep):
    sweep.output.mkdir()
    (sweep.output / "notes.txt").write_text("mine")
    assert sweep("--iterations", "2") == 2 and "exists already" in sweep.err
    assert [path.name for path in sweep.output.iterdir()] == ["notes.txt"]


def test_sizes_on_other_data(sweep, tmp_path):
    other = {**sweep.base, "seq_length": 200, "load": f"hf:{sweep.models[1]}"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**other, "run_dir": "x", "train_iters": 9}))
    sweep.models[1] = tmp_path / "other.yaml"
    assert "must read the same data, but seq_length is 256 (model_16x1), 200 (other)" in refused(
        sweep, "--iterations", "2"
    )
    sweep.base["data_path"] = str(tmp_path / "absent")
    assert "absent" in refused(sweep, "--iterations", "2", "--seq-length", "256")


def test_subsets_that_are_not_nested(sweep, ladder, tmp_path):
    said = refused(sweep, "--subsets", ladder / "subset-40-1.parquet", ladder / "subset-80-2.parquet")
    assert "are not nested" in said
    assert "is no subset" in refused(sweep, "--subsets", ladder / "shards" / "index.parquet")
    (index,) = open_indexes([str(ladder / "shards" / "train-*.tar")])
    write_subset(index, 3, 1, tmp_path / "tiny.parquet")
    assert "fewer than one iteration's 4" in refused(sweep, "--subsets", tmp_path / "tiny.parquet")


def test_two_subsets_of_one_name(sweep, ladder, tmp_path):
    """Their runs would have one configuration file."""
    (index,) = open_indexes([str(ladder / "shards" / "train-*.tar")])
    write_subset(index, 80, 1, tmp_path / "subset-40-1.parquet")
    said = refused(sweep, "--subsets", ladder / "subset-40-1.parquet", tmp_path / "subset-40-1.parquet")
    assert "all would be subset-40-1 in the names of the runs" in said


def test_amounts_in_names_have_all_their_digits():
    told = {"1e10": "flops1e10", "150000": "flops150000", "1000001": "flops1000001", "2.5e18": "flops2.5e18"}
    assert {amount: amount_label("flops", amount) for amount in told} == told


def test_nearest():
    assert [nearest(lambda n: 10 * n, amount, "tokens", 8) for amount in (10, 14, 15, 16, 44, 80, 84, 1e9)] == [
        1, 1, 1, 2, 4, 8, 8, 8,
    ]  # fmt: skip
    assert nearest(lambda n: n, 1000, "tokens", 10**6) == 1000
    with pytest.raises(ValueError, match="less than one iteration"):
        nearest(lambda n: 10 * n, 9.9, "tokens", 8)
