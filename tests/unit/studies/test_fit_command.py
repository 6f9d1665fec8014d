"""The command as a whole: from a study's summaries, or plain points, to tables and pictures; bad input."""

import csv
import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from laver_megatron.studies import fit_command
from laver_megatron.studies.law import Law
from tests.summaries import change, write_run, write_study
from tests.unit.studies.synthetic import TRUE_5, make_points

BETTER_5 = TRUE_5 * (1, 1, 0.9, 1, 1)  # with LaVer: a tenth less of the term of tokens
NAN, INF = float("nan"), float("inf")
PICTURES = ["fit.png", "frontier.png", "iso_flop.png", "residuals.png"]


def run_tool(*arguments):
    """The exit code."""
    try:
        fit_command.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    directory = tmp_path_factory.mktemp("study")
    write_study(directory, {False: Law(TRUE_5).value, True: Law(BETTER_5).value}, noise=1e-4)
    return directory


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes seconds: one test does."""
    monkeypatch.setattr("laver_megatron.studies.fit_plots.draw_study", lambda study, directory: [])


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.processes
def test_a_study_with_two_arms(study, tmp_path, capsys):
    output = tmp_path / "out"
    assert run_tool("--registry", study, "--arm-by", "laver", "--resamples", 20, "--output", output) == 0
    names = ["differences.csv", "frontier.csv", "law.csv", "law.json", "means.csv", "measured.csv", "runs.csv"]
    assert sorted(path.name for path in output.iterdir()) == sorted([*PICTURES, *names])
    told = json.loads((output / "law.json").read_text(), parse_constant=pytest.fail)
    assert list(told["arms"]) == ["baseline", "laver"] and told["column"] == "validation.last.lm_loss"
    for arm, truth_5 in (("baseline", TRUE_5), ("laver", BETTER_5)):
        found = told["arms"][arm]["parameters"]
        assert [found[name]["value"] for name in "Eab"] == pytest.approx(truth_5[[0, 3, 4]], rel=0.02)
        assert all(found[name]["low"] <= found[name]["value"] <= found[name]["high"] for name in "EABab")
        assert told["arms"][arm]["leave_largest_out"]["mean_absolute_error"] < 1e-3
        assert told["arms"][arm]["num_runs"] == 16
    # The overhead is charged: 40% more FLOPs a token.
    costs = [told["arms"][arm]["flops_per_token"]["per_parameter"] for arm in ("baseline", "laver")]
    assert costs == pytest.approx([6.0, 8.4], rel=1e-6)
    for row in rows(output / "differences.csv"):
        ratio = float(row["treated_flops"]) / float(row["baseline_flops"])
        assert ratio == pytest.approx(1.4 if row["kind"] == "equal data" else 1.0, rel=1e-6)
        if row["kind"] == "equal data":
            assert float(row["low"]) <= float(row["difference"]) < 0
    assert len(rows(output / "runs.csv")) == 32 and len(rows(output / "law.csv")) == 10
    text = capsys.readouterr().out
    assert "laver minus baseline by the laws, with 95% interval" in text
    by_the_laws = text.split("by the laws")[1]
    assert by_the_laws.count("  equal data ") == 4
    # LaVer sees fewer tokens at equal FLOPs, but at the most tokens not fewer than its runs; best sizes leave them.
    differences = rows(output / "differences.csv")
    assert {row["outside"] for row in differences if row["kind"] == "equal data"} == {""}
    fewer = [row for row in differences if row["kind"] == "equal FLOPs"]
    assert {row["outside"] for row in fewer if float(row["baseline_tokens"]) < 3e9} == {"laver: D"}
    assert {row["outside"] for row in fewer if float(row["baseline_tokens"]) > 3e9} == {""}
    marked = sum(bool(row["outside"]) for row in differences)
    assert f"{marked} of {len(differences)} differences between the laws are outside the runs" in text
    assert by_the_laws.count("  outside the runs (") >= 1
    frontier = rows(output / "frontier.csv")
    assert {bool(row["outside"]) for row in frontier} == {True, False}
    assert "Qwen2.5 checkpoints are pretrained" in text and "continued training" in told["notes"][0]
    for name in PICTURES:
        with Image.open(output / name) as picture:
            assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 50  # two arms, and not empty


@pytest.mark.usefixtures("no_pictures")
def test_plain_points_are_fitted_without_any_run(tmp_path, capsys):
    """As Chinchilla's points come: sizes, FLOPs and losses; tokens are C / 6N."""
    points = make_points()
    lines = [f"{n},{6 * n * d},{y}" for n, d, y in zip(points.size_R, points.tokens_R, points.column_R, strict=True)]
    lines += ["5e8,6e18,9.0"]  # an outlier
    (tmp_path / "points.csv").write_text("\n".join(["Model Size,Training FLOP,final loss", *lines]))
    names = ("--size-column", "Model Size", "--flops-column", "Training FLOP", "--column", "final loss")
    options = ("--drop-highest", 1, "--resamples", 0, "--budgets", 1e25, "--output", tmp_path)
    assert run_tool("--points", tmp_path / "points.csv", *names, *options) == 0
    told = json.loads((tmp_path / "law.json").read_text())
    found = told["arms"]["all runs"]
    assert [found["parameters"][name]["value"] for name in "EABab"] == pytest.approx(TRUE_5, rel=1e-4)
    assert found["num_runs"] == 42 and found["parameters"]["E"]["low"] is None
    assert rows(tmp_path / "frontier.csv")[-1]["flops"] == "1e+25"
    assert not (tmp_path / "differences.csv").exists()
    text = capsys.readouterr().out
    assert "the 1 runs with the highest final loss are left out" in text and "pretrained" not in text


@pytest.mark.processes
@pytest.mark.usefixtures("no_pictures")
def test_points_with_arms_and_a_ceiling(tmp_path):
    points = make_points((0.2, 5.0, 40.0, 0.2, 0.2), num_sizes=4, num_amounts=4)
    with (tmp_path / "points.csv").open("w") as file:
        file.write("N,D,similarity,kind\n")
        for kind, gain in (("new", 0.02), ("old", 0.0)):
            for n, d, y in zip(points.size_R, points.tokens_R, points.column_R, strict=True):
                file.write(f"{n},{d},{1 - y + gain},{kind}\n")
    base = ("--points", tmp_path / "points.csv", "--column", "similarity", "--arm-by", "kind", "--output", tmp_path)
    assert run_tool(*base, "--ceiling", 1, "--baseline", "old", "--resamples", 20) == 0
    differences = rows(tmp_path / "differences.csv")
    assert all(float(row["difference"]) == pytest.approx(0.02, rel=1e-3) for row in differences[:16])
    assert all(float(row["difference"]) == pytest.approx(0.02) for row in rows(tmp_path / "measured.csv"))
    told = json.loads((tmp_path / "law.json").read_text())
    assert told["arms"]["new"]["parameters"]["E"]["value"] == pytest.approx(0.18, rel=1e-3)


OPTIONS = {"delta": 1.0, "seed": 3, "level": 0.5, "tokens": "text"}


@pytest.mark.processes
@pytest.mark.usefixtures("no_pictures")
def test_options_change_the_numbers(study, tmp_path):
    def fitted(*options):
        assert run_tool("--registry", study / "plain", "--resamples", 20, "--output", tmp_path, *options) == 0
        return json.loads((tmp_path / "law.json").read_text())

    usual = fitted()
    for name, value in OPTIONS.items():
        other = fitted(f"--{name}", value)
        assert other[name] == value != usual[name], name
        assert usual["arms"]["all runs"]["parameters"] != other["arms"]["all runs"]["parameters"], name


@pytest.mark.usefixtures("no_pictures")
def test_size_parts_decide_what_n_is(study, tmp_path):
    base = ("--registry", study / "plain", "--resamples", 0, "--output", tmp_path)
    assert run_tool(*base, "--size-parts", "decoder", "encoder") == 0
    sizes = [run["parameters.decoder"] for run in rows(tmp_path / "runs.csv")]
    largest = json.loads((tmp_path / "law.json").read_text())["arms"]["all runs"]["leave_largest_out"]["size"]
    assert largest == max(map(float, sizes)) + 7


def examples():
    """The arguments in the help's own examples, as lists of words."""
    return [shlex.split(line) for line in fit_command.EXAMPLES]


@pytest.mark.processes
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", [0, 1])
def test_the_examples_of_the_help_are_true(study, tmp_path, number):
    """Of one sweep, with LaVer on and off."""
    words = examples()[number]
    words[words.index("--registry") + 1] = str(study)
    words[words.index("--output") + 1] = str(tmp_path)
    if "last.student_visual_similarity" in words:  # in this study all end at the same one
        rises = {
            run: 1 - Law(np.array([0.2, 5.0, 40.0, 0.2, 0.2])).value(*place) for run, place in places(study / "laver")
        }
        study = tmp_path / "study"
        shutil.copytree(words[words.index("--registry") + 1], study)
        words[words.index("--registry") + 1] = str(study)
        for run, value in rises.items():
            change(study / "laver" / run, validation__last__student_visual_similarity=float(value))
    assert run_tool(*words, "--resamples", "0") == 0
    told = json.loads((tmp_path / "law.json").read_text())
    assert [arm["num_runs"] for arm in told["arms"].values()] == ([16, 16] if number == 0 else [16])
    if number == 1:
        assert told["where"] == ["laver=true"] and told["arms"]["all runs"]["parameters"]["E"]["value"] < 0.3


def places(directory):
    """(name, (N, D)) of every run."""
    for path in sorted(directory.glob("*/run_summary.json")):
        told = json.loads(path.read_text())
        yield path.parent.name, (told["parameters"]["decoder"] + 10, told["tokens"]["total"])


# --- bad input -----------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert run_tool(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    return captured.err


@pytest.mark.usefixtures("no_pictures")
def test_faults_of_runs_are_told_and_nothing_is_written(tmp_path, capsys):
    write_study(tmp_path / "runs", {False: Law(TRUE_5).value, True: Law(TRUE_5).value}, sizes=3, amounts=3)
    bad = tmp_path / "runs" / "plain" / "bad"
    write_run(bad, None, settings={"seed": 77})
    options = ("--registry", tmp_path / "runs" / "plain", "--resamples", 0, "--output", tmp_path / "out")
    message = refused(capsys, *options)
    assert f"{bad}: nan: validation.last.loss" in message and not (tmp_path / "out").exists()
    assert run_tool(*options, "--leave-out", "nan") == 0
    told = json.loads((tmp_path / "out" / "law.json").read_text())
    assert told["arms"]["all runs"]["num_runs"] == 9 and "bad: nan" in told["left_out"][0]
    assert f"left out: {bad}: nan" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_settings_that_differ_are_noted(tmp_path, capsys):
    write_study(tmp_path, {False: Law(TRUE_5).value, True: Law(TRUE_5).value}, sizes=3, amounts=3)
    change(next((tmp_path / "plain").iterdir()), config__lr=0.5)
    assert run_tool("--registry", tmp_path / "plain", "--resamples", 0, "--output", tmp_path / "out") == 0
    assert "all runs: the runs also differ in config.lr, which the law takes for noise" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures")
def test_arms_on_other_data_are_refused_unless_allowed(tmp_path, capsys):
    write_study(tmp_path / "runs", {False: Law(TRUE_5).value, True: Law(TRUE_5).value}, sizes=3, amounts=3)
    for run in (tmp_path / "runs" / "laver").iterdir():
        change(run, config__valid_data_path=["other"], config__lr=0.5)
    options = ("--registry", tmp_path / "runs", "--arm-by", "laver", "--resamples", 0, "--output", tmp_path / "out")
    message = refused(capsys, *options)
    assert "cannot be compared: their runs differ in data or validation" in message
    assert 'valid_data_path: ["other"] in laver, null in baseline' in message and not (tmp_path / "out").exists()
    assert run_tool(*options, "--allow-differences", "valid_data_path") == 0
    text = capsys.readouterr().out
    assert 'also differ in valid_data_path (["other"] in laver' in text and "also differ in lr (0.5 in laver" in text


@pytest.mark.usefixtures("no_pictures")
def test_a_stray_value_of_the_arms_is_named(tmp_path, capsys):
    write_study(tmp_path, {False: Law(TRUE_5).value, True: Law(TRUE_5).value}, sizes=3, amounts=3)
    stray = sorted((tmp_path / "laver").iterdir())[4]
    change(stray, config__laver="maybe")
    message = refused(capsys, "--registry", tmp_path, "--arm-by", "laver", "--output", tmp_path / "out")
    assert "maybe: no law can be fitted" in message and "1 runs are fewer than the law's 5 parameters" in message
    assert f"maybe (1: {stray})" in message and "baseline (9: " in message


@pytest.mark.parametrize(
    "options, message",
    [
        (("--column", "last.accuracy"), "no run has a column 'last.accuracy'"),
        (("--arm-by", "lm_loss"), "could be any of validation.last.lm_loss"),
        (("--drop-highest", 28), "4 runs are fewer than the law's 5 parameters"),
        (("--arm-by", "laver", "--baseline", "other"), "the arms are laver and baseline; name the one to compare with"),
        (("--column", "time.training_seconds", "--ceiling", "30"), "is not below the ceiling 30 (the highest is 60)"),
        (("--drop-highest", 40, "--arm-by", "laver"), "0 runs are fewer than the law's 5 parameters"),
        (("--column", "last.student_visual_similarity", "--ceiling", 1), "--where laver=true"),
        (
            ("--arm-by", "laver", "--column", "last.teacher_entropy"),
            "no run of baseline has a number in validation.last",
        ),
        (("--arm-by", "laver", "--column", "config.load"), "no run has a number in config.load; choose another column"),
        (("--where", "laver=maybe"), "no run has 'maybe' in config.laver; there are true, false"),
        (("--resamples", -1), "--resamples -1 is below 0"),
        (("--resamples", 1), "--resamples 1 are too few for an interval; use at least 20, or 0"),
        (("--seed", -1), "--seed -1 is below 0"),
        (("--ceiling", "nan"), "--ceiling nan is not finite"),
        (("--size-parts", "decoder", "decoder"), "--size-parts names decoder twice, which would count twice in N"),
        (("--level", 1), "--level 1 is not between 0 and 1"),
        *((("--delta", value), f"--delta {value:g} is not between 1e-12 and 1") for value in (0, 1e-300, NAN, INF, 2)),
        (("--drop-highest", -2), "--drop-highest -2 is below 0"),
        *(
            (("--budgets", 1e20, value), f"--budgets {value:g} is not above 0 and at most 1e+35")
            for value in (0, NAN, INF)
        ),
    ],
)
def test_what_cannot_be_fitted_is_told(study, tmp_path, capsys, options, message):
    assert message in refused(capsys, "--registry", study, *options, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_noise_does_not_move_the_study(study):
    """What the tests above stand on: the files hold the laws they are made of."""
    told = [json.loads(path.read_text()) for path in sorted(study.rglob("run_summary.json"))]
    values = [run["validation"]["last"]["lm_loss"] for run in told if not run["config"]["laver"]]
    sizes = [run["parameters"]["decoder"] + 10 for run in told if not run["config"]["laver"]]
    amounts = [run["tokens"]["total"] for run in told if not run["config"]["laver"]]
    assert np.asarray(values) == pytest.approx(Law(TRUE_5).value(sizes, amounts), rel=5e-4)


@pytest.mark.processes
def test_what_an_earlier_study_left_is_removed(study, tmp_path, no_pictures, capsys):
    """Its tables would pass for this study's own; files of others stay."""
    options = ("--registry", study, "--output", tmp_path, "--resamples", 0)
    assert run_tool(*options, "--arm-by", "laver") == 0
    (tmp_path / "mine.csv").write_text("kept")
    assert {"measured.csv", "means.csv", "runs.csv"} < {path.name for path in tmp_path.iterdir()}
    assert run_tool(*options, "--where", "laver=true") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "frontier.csv", "law.csv", "law.json", "mine.csv", "runs.csv",
    ]  # fmt: skip
    assert "removed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--arm-by", "laver", "--allow-differences", "nosuch"),
            "names nosuch; the settings of data and validation are",
        ),
        (("--allow-differences", "seq_length"), "is for two arms of a --registry"),
    ],
)
def test_differences_that_cannot_be_allowed(study, tmp_path, capsys, flags, message):
    assert run_tool("--registry", study, "--output", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_runs_without_a_partner_are_told(study, tmp_path, no_pictures, capsys):
    shutil.copytree(study, tmp_path / "study")
    one = min((tmp_path / "study").rglob("run_summary.json")).parent
    change(one, seed=77)
    options = ("--registry", tmp_path / "study", "--arm-by", "laver", "--resamples", 0, "--output", tmp_path / "out")
    assert run_tool(*options) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "have no partner" in line]
    assert note.startswith("note: 2 of ") and "none of its size and seed" in note and one.name in note


def two_runs_of_each_arm(directory):
    for laver in (False, True):
        for size, value in ((7e9, 2.0), (7e10, 1.5)):
            loss = value - (0.02 if laver else 0)
            write_run(
                directory / f"{size:g}-{laver}", loss, size=size, settings={"laver": laver, "load": f"hf:{size:g}"}
            )


def test_too_few_runs_for_a_law_are_compared_without_one(tmp_path, capsys):
    """A 7B and a 70B of each arm: no law, but two pairs, and nothing of an earlier study beside them."""
    two_runs_of_each_arm(tmp_path / "runs")
    output = tmp_path / "out"
    output.mkdir()
    (output / "law.json").write_text("{}")
    (output / "fit.png").write_bytes(b"")
    options = ("--registry", tmp_path / "runs", "--arm-by", "laver", "--output", output)
    assert run_tool(*options) == 2
    assert "--no-law compares the two arms by their pairs of runs alone" in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == ["fit.png", "law.json"]
    assert run_tool(*options, "--no-law") == 0
    out = capsys.readouterr().out
    assert out.startswith("laver minus baseline, measured") and "2 pairs    -0.02 [-0.02, -0.02]" in out
    assert sorted(path.name for path in output.iterdir()) == ["means.csv", "measured.csv", "runs.csv"]
    assert [float(row["difference"]) for row in rows(output / "measured.csv")] == pytest.approx([-0.02] * 2)


def test_every_arm_is_compared_with_the_baseline(tmp_path, capsys):
    """Arms of a sweep, by name; where they differ is what they are, not a fault of the comparison."""
    arms = {"plain": (0, {"laver": False}), "mim": (0.01, {}), "cga": (-0.02, {"gram_weight": 2.0})}
    for size in (7e9, 70e9):
        for arm, (better, settings) in arms.items():
            settings = {**settings, "arm": arm, "load": f"hf:{size:g}"}
            write_run(tmp_path / "runs" / f"{size:g}-{arm}", 2 + 1e9 / size + better, size=size, settings=settings)
    output = tmp_path / "out"
    options = ("--registry", tmp_path / "runs", "--arm-by", "arm", "--no-law", "--output", output)
    assert run_tool(*options) == 2 and "name the one to compare with as --baseline" in capsys.readouterr().err
    assert run_tool(*options, "--baseline", "plain") == 0
    out = capsys.readouterr().out
    assert "mim minus plain, measured" in out and "cga minus plain, measured" in out and "mim minus cga" not in out
    assert "note: plain and cga differ in laver (false in plain, true in cga)" in out
    differences = [(row["arm"], float(row["difference"])) for row in rows(output / "measured.csv")]
    assert [arm for arm, _ in differences] == ["cga"] * 2 + ["mim"] * 2
    assert [difference for _, difference in differences] == pytest.approx([-0.02] * 2 + [0.01] * 2)
    assert {row["arm"] for row in rows(output / "means.csv")} == {"mim", "cga"}


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "pairs of runs are those of two arms, but there are 1 (all runs)"),
        (("--arm-by", "laver", "--baseline", "plain"), "the arms are baseline and laver; name the one to compare with"),
        (("--arm-by", "load"), "nothing is measured in pairs"),
    ],
)
def test_what_has_no_pairs(tmp_path, capsys, flags, message):
    two_runs_of_each_arm(tmp_path / "runs")
    if "load" in flags:
        flags = (*flags, "--baseline", "hf:7e+09")
    assert run_tool("--registry", tmp_path / "runs", "--output", tmp_path / "out", "--no-law", *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
