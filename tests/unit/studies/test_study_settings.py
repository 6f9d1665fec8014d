"""Arms must differ in nothing but the arm: what is refused, what is noted, what is as it should be."""

import csv

import numpy as np
import pytest

from laver_megatron.studies.registry import read_registry
from laver_megatron.studies.study import study_of_registry
from laver_megatron.studies.study_settings import check_equal_settings, setting_notes, varying_settings
from tests.summaries import change, write_run


def write_arms(directory, *, of_size=None, of_arm=None, amounts=(100, 200)):
    """Runs of three sizes and some iterations in two arms. of_size, of_arm: functions to further settings."""
    for laver in (True, False):
        for size in (1000, 2000, 4000):
            for iterations in amounts:
                extra = {**(of_size(size, iterations) if of_size else {}), **(of_arm(laver) if of_arm else {})}
                write_run(
                    directory / f"{'laver' if laver else 'baseline'}-{size}-{iterations}",
                    size=size,
                    settings={"laver": laver, "load": f"hf:{size}", "train_iters": iterations, **extra},
                    iteration=iterations,
                    counted_iterations=iterations,
                    consumed_tokens=100 * iterations,
                )
    return directory


def notes_of(directory, allowed=(), arm_by="config.laver"):
    return check_equal_settings(read_registry([directory]).arms(arm_by), arm_by, allowed)


def test_a_ladder_may_vary_with_size_and_data(tmp_path):
    """Rate by size, warm-up and subset by amount, and LaVer's own settings: both arms alike."""
    write_arms(
        tmp_path,
        of_size=lambda size, iterations: {
            "lr": 1 / size, "lr_warmup_iters": iterations // 10, "data_path": (f"subset-{iterations}",),
        },
        of_arm=lambda laver: {"mask_ratio": 0.3} if laver else {},
    )  # fmt: skip
    assert notes_of(tmp_path) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"valid_data_path": ("other",)}, {"data_path": ("other",)}, {"seq_length": 128}, {"global_batch_size": 7},
        {"eval_iters": 9},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_other_data_or_validation_is_refused(tmp_path, settings):
    write_arms(tmp_path, of_arm=lambda laver: settings if laver else {})
    (name,) = settings
    with pytest.raises(
        ValueError, match=rf"differ in data or validation:\n  - {name}: .* in baseline, .* in laver"
    ) as told:
        notes_of(tmp_path)
    assert f"--allow-differences {name}" in str(told.value)
    assert [name in note for note in notes_of(tmp_path, [name])] == [True]


def test_what_may_be_chosen_for_an_arm_is_noted(tmp_path):
    write_arms(tmp_path, of_arm=lambda laver: {"lr": 1e-5, "weight_decay": 0.5} if laver else {})
    rate, decay = notes_of(tmp_path)
    assert (
        "baseline and laver also differ in lr (2e-05 in baseline, 1e-05 in laver)" in rate and "weight_decay" in decay
    )


def test_one_run_on_other_data_is_enough(tmp_path):
    write_arms(tmp_path)
    change(tmp_path / "laver-2000-200", config__valid_data_path=["other"])
    with pytest.raises(ValueError, match=r'valid_data_path: null in baseline, \["other"\] in laver'):
        notes_of(tmp_path)


def test_arms_of_other_amounts_are_compared_by_size(tmp_path):
    """As a compute budget makes them: the arms share no amount, and warm-ups follow the iterations."""
    for laver, amounts in ((True, (70, 140)), (False, (100, 200))):
        write_arms(
            tmp_path / str(laver),
            of_size=lambda size, iterations: {"lr": 1 / size, "lr_warmup_iters": iterations // 10},
            amounts=amounts,
        )
        for path in (tmp_path / str(laver)).glob("laver-*" if not laver else "baseline-*"):
            (path / "run_summary.json").unlink()
    assert notes_of(tmp_path) == []
    change(tmp_path / "True" / "laver-1000-70", config__lr=0.5)
    (note,) = notes_of(tmp_path)
    assert "lr (0.001 in baseline, 0.001 and 0.5 in laver)" in note


def test_the_setting_that_makes_the_arms_is_none_of_the_differences(tmp_path):
    write_arms(tmp_path, of_size=lambda size, iterations: {"gram_weight": 1.0})
    for path in tmp_path.glob("baseline-*"):
        change(path, config__laver=True, config__gram_weight=0.0, config__mask_ratio=0.1)
    (note,) = notes_of(tmp_path, arm_by="config.gram_weight")
    assert "also differ in mask_ratio" in note


def subset_of(iterations):
    return f"subsets/{iterations}.parquet"


def write_manifest(directory, registry, **wrong):
    """As a sweep leaves it beside its runs."""
    with (directory / "manifest.csv").open("w") as file:
        writer = csv.DictWriter(file, ["name", "seed", "amount", "config_hash"])
        writer.writeheader()
        for run in registry.runs:
            amount = subset_of(run.value("train_iters"))
            line = {"name": run.path.name, "seed": run.value("seed"), "amount": amount}
            writer.writerow({**line, "config_hash": run.value("config_hash"), **wrong})


def test_subsets_of_a_sweep_are_its_amounts(tmp_path):
    write_arms(tmp_path / "runs", of_size=lambda size, iterations: {"data_path": (subset_of(iterations),)})
    registry = read_registry([tmp_path / "runs"])
    assert varying_settings(registry.arms("laver")["laver"]) == ["config.data_path"]
    write_manifest(tmp_path, registry, amount="elsewhere")
    assert varying_settings(registry.arms("laver")["laver"]) == ["config.data_path"]
    (note,) = setting_notes(registry.arms("laver")["laver"])
    assert "config.data_path changes with the number of tokens: right where these are nested subsets" in note
    write_manifest(tmp_path, registry)
    assert varying_settings(registry.arms("laver")["laver"]) == []
    study = study_of_registry([tmp_path / "runs"], "last.lm_loss", arm_by="laver")
    assert study.notes == () and [arm.notes for arm in study.arms.values()] == [(), ()]
    assert np.unique(study.arms["laver"].observations.tokens_R).tolist() == [10_000, 20_000]


def test_other_data_of_one_amount_are_noise(tmp_path):
    write_arms(tmp_path, of_size=lambda size, iterations: {"data_path": (f"data-{size}-{iterations}",)})
    (note,) = setting_notes(read_registry([tmp_path]).arms("laver")["laver"])
    assert note == "the runs also differ in config.data_path, which the law takes for noise"
