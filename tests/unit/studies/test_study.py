"""The arms of a study: plain points, what is refused with its line, and settings in which arms may not differ."""

import csv

import numpy as np
import pytest

from laver_megatron.studies.fitted_study import FitSettings, fit_study
from laver_megatron.studies.registry import read_registry
from laver_megatron.studies.study import (
    ALL_RUNS,
    check_equal_settings,
    setting_notes,
    study_of_csv,
    study_of_registry,
    varying_settings,
)
from tests.summaries import change, write_run
from tests.unit.studies.synthetic import make_points


def read(tmp_path, text, **options):
    (tmp_path / "points.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return study_of_csv(tmp_path / "points.csv", **options)


def test_as_spreadsheets_write_them(tmp_path):
    """A byte order mark, spaces after commas, and lines that are empty."""
    study = read(tmp_path, b"\xef\xbb\xbfN, D , loss\r\n\r\n1e9, 2e9, 3\r\n,,\r\n2e9,3e9,2\r\n")
    points = study.arms[ALL_RUNS].observations
    assert points.size_R.tolist() == [1e9, 2e9] and points.tokens_R.tolist() == [2e9, 3e9]
    assert points.column_R.tolist() == [3, 2] and points.names == ("line 3", "line 5")


def test_repeats_that_a_seed_tells_apart(tmp_path):
    study = read(tmp_path, "N,D,loss,seed\n1e9,2e9,3,1\n1e9,2e9,3,2\n")
    assert study.arms[ALL_RUNS].seeds == ("1", "2")


def test_points_chosen_by_a_value(tmp_path):
    text = "N,D,loss,kind,year\n1e9,2e9,3,a,2024\n2e9,2e9,2,b,2025\n3e9,2e9,1,a,2025\n"
    for where, names in (
        ((("kind", "a"),), ("line 2", "line 4")),
        ((("year", "2025.0"),), ("line 3", "line 4")),
        ((("kind", "a"), ("year", "2025")), ("line 4",)),
    ):
        assert read(tmp_path, text, where=where).arms[ALL_RUNS].observations.names == names
    with pytest.raises(ValueError, match=r"has no point with 'c' in kind"):
        read(tmp_path, text, where=(("kind", "c"),))


@pytest.mark.parametrize(
    "text, message",
    [
        ("N,loss\n1,2\n", "has no column D or FLOPs; its columns are N, loss"),
        ("a,b\n1,2\n", "has no column N, loss, D or FLOPs"),
        ("", "has no column N, loss, D or FLOPs"),
        ("N,D,D,loss\n1,2,3,4\n", "has the column D twice"),
        ("N,D,loss\n", "has a header and no points"),
        ("N,D,loss\n1e9,1e9,2\n1e9,many,2\n", "line 3: D is 'many', not a number"),
        ("N,D,loss\n1e9,1e9\n", "line 2: 2 cells where the header has 3"),
        ("N,D,loss\n1e9,1e9,2\n\n1e9,1,000,2\n", "line 4: 4 cells where the header has 3"),
        ("N,D,loss\n1e9,1e9,2\n2e9,1e9,2\n1000000000,1e9,2.0\n", "line 4: the same as line 2, and one run counts once"),
    ],
)
def test_points_that_cannot_be_read(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def spoilt(**values):
    """A good table in which one line has these values instead."""
    points = make_points(noise=0.001)
    rows = [
        {"N": n, "D": d, "FLOPs": 6 * n * d, "loss": y}
        for n, d, y in zip(points.size_R, points.tokens_R, points.column_R, strict=True)
    ]
    rows[3] |= values
    return rows


@pytest.mark.parametrize(
    "columns, values, message",
    [
        (("N", "D", "FLOPs", "loss"), {"N": 0}, "parameters of line 5 is not above 0"),
        (("N", "FLOPs", "loss"), {"N": 0}, "parameters of line 5 is not above 0"),
        (("N", "D", "FLOPs", "loss"), {"D": "nan"}, "tokens of line 5 is NaN or infinite"),
        (("N", "D", "loss"), {"loss": "nan"}, "loss of line 5 is NaN or infinite"),
        (("N", "D", "FLOPs", "loss"), {"FLOPs": "nan"}, "FLOPs of line 5 are not finite and above 0"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_values_that_cannot_be_are_told_by_their_line(tmp_path, columns, values, message):
    lines = [",".join(columns), *(",".join(str(row[name]) for name in columns) for row in spoilt(**values))]
    study = read(tmp_path, "\n".join(lines))
    with pytest.raises(ValueError, match=message):
        fit_study(study.arms, FitSettings(num_resamples=0))


@pytest.mark.parametrize("keep", [lambda row: row["N"] == 5e8, lambda row: row["N"] == 5e8 and row["D"] < 1e10])
def test_too_little_is_said_before_the_cost_is_judged(tmp_path, keep):
    rows = [row for row in spoilt() if keep(row)]
    study = read(tmp_path, "\n".join(["N,D,FLOPs,loss", *(",".join(map(str, row.values())) for row in rows)]))
    with pytest.raises(ValueError, match=r"have 1 different numbers of parameters \(from 5e\+08 to 5e\+08\)"):
        fit_study(study.arms, FitSettings(num_resamples=0))


# --- settings in which arms may not differ ---------------------------------------------------------------


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
