"""What a summary says of a run, and which settings make two runs the same."""

import json
import math
import os

import pytest

from laver_megatron.run_log.records import json_line
from laver_megatron.run_log.run_summary import config_hash, make_summary, read_run_records
from tests.summaries import SumsOfARun, make_config, write_run


def test_the_file_is_strict_json_and_exact(tmp_path):
    written = write_run(tmp_path / "run", 2.0, model_flops=3 * 10**24 + 1, laver_flops=10**24)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads((tmp_path / "run" / "run_summary.json").read_text(), parse_constant=refuse)
    assert read == json.loads(json.dumps(written))
    assert (read["format"], read["version"], read["name"]) == ("laver_megatron run summary", 1, "run")
    assert read["flops"] == {
        "model": 3 * 10**24 + 1, "laver_overhead": 10**24, "language_model": 2 * 10**24 + 1,
    }  # fmt: skip
    assert read["tokens"] == {"total": 10_000, "text": 4_000, "visual": 6_000, "label": 900}
    assert read["time"]["training_seconds"] == 60.0 and read["time"]["device_hours"] == 240 / 3600
    assert read["config"]["data_path"] == ["shards"] and read["seed"] == 1234
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "run_summary.json"]  # nothing temporary is left


@pytest.mark.parametrize("iteration, state", [(99, "unfinished"), (100, "finished")])
def test_a_run_is_finished_at_its_last_iteration(tmp_path, iteration, state):
    assert write_run(tmp_path, iteration=iteration)["state"] == state


def test_shares_of_right_answers_are_kept_by_family(tmp_path):
    record = {"iteration": 20, "loss": 2.0, "lm_loss": 2.0, "answer_accuracy": 0.5, "answer_accuracy/chart": 0.25}
    summary = make_summary(
        make_config(tmp_path, laver=False), SumsOfARun(), {}, 0, {}, [{**record, "elapsed_seconds": 1.0}], []
    )
    assert summary["validation"]["last"] == summary["validation"]["best"] == record


def test_a_pipe_holds_no_records(tmp_path):
    """Nobody waits for it."""
    os.mkfifo(tmp_path / "restarts.jsonl")
    assert read_run_records(tmp_path) == [[], [], []]


def test_last_and_best_validation(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    losses = {10: 3.0, 20: 1.5, 30: math.nan, 40: 2.0}
    lines = [json_line({"iteration": i, "loss": x, "lm_loss": x}) for i, x in losses.items()]
    (run_dir / "validation.jsonl").write_text("".join(lines))
    validation, training, _ = read_run_records(run_dir)
    assert training == []
    summary = make_summary(make_config(run_dir, laver=False), SumsOfARun(), {}, 0, {}, validation, training)
    assert summary["validation"]["last"] == {"iteration": 40, "loss": 2.0, "lm_loss": 2.0}
    assert summary["validation"]["best"] == {"iteration": 20, "loss": 1.5, "lm_loss": 1.5}
    assert summary["training"] is None
    # A last validation that was NaN is told as that, not replaced by the one before.
    summary = make_summary(make_config(run_dir, laver=False), SumsOfARun(), {}, 0, {}, validation[:3], [])
    assert summary["validation"]["last"]["lm_loss"] is None and summary["validation"]["best"]["lm_loss"] == 1.5


def test_training_numbers_are_means_without_skipped_iterations(tmp_path):
    training = [{"iteration": i, "loss": float(i), "lm_loss": None if i == 99 else float(i)} for i in range(1, 101)]
    summary = make_summary(make_config(tmp_path, laver=False), SumsOfARun(), {}, 0, {}, [], training)
    assert summary["training"]["num_iterations"] == 20
    assert summary["training"]["loss"] == sum(range(81, 101)) / 20
    assert summary["training"]["lm_loss"] == (sum(range(81, 101)) - 99) / 19
    assert summary["validation"] is None


def test_the_curve_by_layer_becomes_columns_of_the_evaluations_that_have_it():
    validation = [
        {"iteration": 2, "loss": 3.0, "lm_loss": 3.0},
        {"iteration": 4, "loss": 4.0, "lm_loss": 4.0, "visual_similarity": [0.25, 0.5, 0.75]},
    ]
    summary = make_summary(make_config("run", laver=False), SumsOfARun(), {}, 0, {}, validation, [])
    assert summary["validation"]["best"] == {"iteration": 2, "loss": 3.0, "lm_loss": 3.0}
    columns = {"layer_1": 0.25, "layer_2": 0.5, "layer_3": 0.75, "last": 0.75}
    assert summary["validation"]["last"]["visual_similarity"] == columns


SAME = {
    "seed": 5, "run_dir": "elsewhere", "tensor_model_parallel_size": 4, "micro_batch_size": 2, "num_workers": 7,
    "save_interval": 3, "exit_interval": 3, "log_interval": 9, "tensorboard": True, "attention_kernel": "dense",
    "preset": "paper", "eval_interval": 10, "inspect_interval": 20,
    "recompute_granularity": "full", "shard_cache": "/local",
}  # fmt: skip
OTHER = {
    "load": "hf:other", "data_path": ("more",), "train_iters": 101, "lr": 1e-3, "laver": False, "mask_ratio": 0.1,
    "global_batch_size": 2, "seq_length": 2048, "freeze": (), "bf16": True, "positions": "1d", "eval_iters": 9,
    "gram_loss": "ga", "valid_data_path": ("held-out",), "data_weights": (0.5,),
}  # fmt: skip


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_the_hash_is_of_what_decides_the_numbers(name):
    changed = config_hash(make_config("run", **{name: {**SAME, **OTHER}[name]}))
    assert (changed == config_hash(make_config("run"))) == (name in SAME)


def test_without_laver_its_settings_do_not_count():
    plain = config_hash(make_config("run", laver=False))
    assert plain == config_hash(make_config("run", laver=False, mask_ratio=0.3, gram_loss="none"))
    assert plain != config_hash(make_config("run", laver=False, lr=1.0))
