"""The table of an ablation: from run directories to differences with intervals."""

import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy import stats

from laver_megatron.studies.arm_table import difference, find_baseline, markdown, read_results
from laver_megatron.studies.arm_table_command import main

VALUES = {  # lm_loss and accuracy of "text" by arm and seed
    "baseline": {1: (1.0, 0.50), 2: (1.2, 0.40), 3: (0.9, 0.60)},
    "mim": {1: (1.1, 0.55), 2: (1.3, 0.45), 3: (1.0, 0.65)},
    "mim-cga": {1: (0.9, 0.70), 2: (1.25, 0.35), 3: (0.8, 0.66)},
}


def write_run(sweep, name, values, state="finished"):
    directory = sweep / "runs" / name
    directory.mkdir(parents=True)
    (directory / "run_summary.json").write_text(json.dumps({"state": state}))
    loss, accuracy = values
    early = {"iteration": 5, "lm_loss": 9.0, "answer_accuracy/text": 0.0}
    last = {"iteration": 10, "lm_loss": loss, "answer_accuracy/text": accuracy, "visual_similarity": [0.1, accuracy]}
    (directory / "validation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (early, last)))
    metrics = [{"iteration": i, "student_visual_similarity": 0.1 * i if i != 2 else None} for i in (1, 2, 3)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))


@pytest.fixture
def sweep(tmp_path):
    lines = ["name,num_gpus,num_nodes,arm,seed"]
    for arm, seeds in VALUES.items():
        for seed, values in seeds.items():
            write_run(tmp_path, f"{arm}-seed{seed}", values)
            lines.append(f"{arm}-seed{seed},1,1,{arm},{seed}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_differences_are_scipys_paired_t(sweep):
    arms, left = read_results(sweep)
    assert [arm.name for arm in arms] == list(VALUES) and not left
    baseline = find_baseline(arms, "baseline")
    for column, place in (("lm_loss", 0), ("answer_accuracy/text", 1)):
        theirs = [values[place] for values in VALUES["baseline"].values()]
        ours = [values[place] for values in VALUES["mim-cga"].values()]
        found = difference(arms[2], baseline, column)
        interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        assert found.num_seeds == 3 and found.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
        assert not found.is_clear


def test_only_seeds_of_both_are_pairs(sweep):
    arms, _ = read_results(sweep)
    del arms[1].seeds[2]
    found = difference(arms[1], arms[0], "lm_loss")
    assert found.num_seeds == 2 and found.mean == pytest.approx(0.1)
    del arms[1].seeds[1], arms[1].seeds[3]
    assert difference(arms[1], arms[0], "lm_loss") is None


def test_the_command_writes_table_and_picture(sweep, tmp_path, capsys):
    (sweep / "runs" / "mim-seed3" / "run_summary.json").write_text('{"state": "unfinished"}')
    main([str(sweep), "--output", str(tmp_path / "out")])
    text, said = capsys.readouterr()
    assert (tmp_path / "out" / "table.md").read_text() == text
    assert "| baseline | 3 | 1.033 | 0.500 | 0.500 |" in text
    assert "| mim | 2 | **+0.100 [+0.100, +0.100]** | **+0.050" in text
    assert "Left out: mim-seed3 (not finished)." in text and "table.md" in said
    assert (tmp_path / "out" / "arms.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--baseline", "bother"], "there is no arm 'bother'"), (["--baseline", "baseline"], "no run of the baseline")],
)
def test_a_baseline_that_is_not_there(sweep, tmp_path, capsys, arguments, words):
    for path in (sweep / "runs").glob("baseline-*/run_summary.json"):
        path.unlink()
    with pytest.raises(SystemExit) as ended:
        main([str(sweep), "--output", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_sweeps(sweep, tmp_path):
    with pytest.raises(ValueError, match="has no manifest.csv"):
        read_results(tmp_path / "elsewhere")
    (sweep / "runs" / "mim-seed1" / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match="mim-seed1 is finished but has no validation"):
        read_results(sweep)
    with (sweep / "manifest.csv").open("a") as file:
        file.write("baseline-seed1-b,1,1,baseline,1\n")
    write_run(sweep, "baseline-seed1-b", (1.0, 0.5))
    (sweep / "runs" / "mim-seed1" / "validation.jsonl").write_text('{"iteration": 1, "lm_loss": 1.0}\n')
    with pytest.raises(ValueError, match="two runs of arm baseline have the seed 1"):
        read_results(sweep)


def test_models_of_different_depth_are_refused_with_both_numbers(sweep):
    write_run(sweep, "mim-seed4", (1.0, 0.5))
    path = sweep / "runs" / "mim-seed4" / "validation.jsonl"
    path.write_text(path.read_text().replace("[0.1, 0.5]", "[0.1, 0.5, 0.6]"))
    with (sweep / "manifest.csv").open("a") as file:
        file.write("mim-seed4,1,1,mim,4\n")
    with pytest.raises(ValueError, match="visual_similarity has 2 layers in baseline-seed1 and 3 in mim-seed4"):
        read_results(sweep)


def test_runs_without_metrics_are_left_out_of_the_curve_in_training(sweep, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **style: titles.append(text))
    for number, seed in enumerate((1, 2, 3)):
        (sweep / "runs" / f"mim-seed{seed}" / "metrics.jsonl").unlink()
        main([str(sweep), "--output", str(tmp_path / "out")])
        assert titles[-1].endswith(f"(without metrics.jsonl: {number + 1} of 9 runs)")
    assert (tmp_path / "out" / "arms.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_interval(sweep):
    arms, _ = read_results(sweep)
    for arm in arms:
        for seed in (2, 3):
            del arm.seeds[seed]
    assert "| mim | 1 | +0.100 | +0.050 | +0.050 |" in markdown(arms, arms[0])


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")], ids=str)
def test_a_run_whose_loss_is_no_number_is_left_out_by_name(sweep, tmp_path, capsys, loss):
    """Its seed counts in no column: the seeds that the table names are those of its means."""
    path = sweep / "runs" / "mim-seed2" / "validation.jsonl"
    path.write_text(json.dumps({"iteration": 10, "lm_loss": loss, "answer_accuracy/text": 0.4}) + "\n")
    main([str(sweep), "--output", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "| mim | 2 | 1.050 | 0.600 |" in text and "nan" not in text
    assert "Left out: mim-seed2 (lm_loss is no number)." in text


def test_a_manifest_that_cannot_be_read_is_named(sweep):
    manifest = sweep / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("mim,2", "mim,two"))
    with pytest.raises(ValueError, match=r"manifest.csv: the seed 'two' is no integer"):
        read_results(sweep)
    manifest.write_text("name,arm,seed\nbaseline-seed1,,1\n")
    with pytest.raises(ValueError, match=r"manifest.csv: run 1 has no name or no arm"):
        read_results(sweep)
    manifest.write_bytes(b"\xff\xfename")
    with pytest.raises(ValueError, match=r"manifest.csv cannot be read"):
        read_results(sweep)
