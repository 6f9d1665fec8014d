"""Reading the summaries of a study: columns, arms, points for a fit, and runs that are refused by name."""

import csv
import json

import pytest

from laver_megatron.studies.registry import FAULTS, read_registry
from laver_megatron.studies.study import varying_settings
from tests.summaries import change, write_run


@pytest.fixture
def study(tmp_path):
    """Three good runs of different seeds, one of them deeper in the tree and without LaVer."""
    write_run(tmp_path / "a", 2.0, size=1000, settings={"seed": 1})
    write_run(tmp_path / "b", 3.0, size=2000, settings={"seed": 2}, consumed_tokens=20_000)
    write_run(tmp_path / "more" / "deep" / "c", 4.0, size=3000, settings={"seed": 3, "laver": False})
    return tmp_path


def names(registry):
    return [run.path.name for run in registry.runs]


def test_a_tree_a_list_and_a_file_are_read(study):
    assert names(read_registry([study])) == ["a", "b", "c"]
    assert names(read_registry([study / "b", study / "more"])) == ["b", "c"]
    assert names(read_registry([study / "a" / "run_summary.json", study])) == ["a", "b", "c"]  # each once


def test_columns_by_their_ends(study):
    registry = read_registry([study])
    assert registry.full_name("laver") == "config.laver"
    assert registry.full_name("last.lm_loss") == "validation.last.lm_loss"
    assert registry.full_name("seed") == "seed"  # whole, although config.seed ends alike
    with pytest.raises(
        ValueError, match=r"'lm_loss' could be any of validation\.last\.lm_loss, validation\.best\.lm_loss"
    ):
        registry.full_name("lm_loss")
    with pytest.raises(ValueError, match=r"no run has a column 'last\.similarity'; there are .*visual_similarity"):
        registry.full_name("last.similarity")
    with pytest.raises(ValueError, match=r"no run has a column 'lavr'; there are config\.laver, config\.lr: see"):
        registry.full_name("lavr")
    with pytest.raises(ValueError, match=r"no run has a column 'abacus'; there are (\S+, ){7}\S+ and \d+ more: see"):
        registry.full_name("abacus")


def test_every_number_is_a_column_also_one_that_was_added(study):
    change(study / "a", analysis={"effective_rank": 12.5})
    registry = read_registry([study])
    assert registry.runs[0].value(registry.full_name("effective_rank")) == 12.5
    rows = list(csv.DictReader(registry.to_csv().splitlines()))
    assert [row["path"] for row in rows] == [str(study / name) for name in ("a", "b", "more/deep/c")]
    assert rows[1]["parameters.decoder"] == "2000" and rows[1]["flops.model"] == str(10**20 + 1)
    assert rows[0]["analysis.effective_rank"] == "12.5" and rows[1]["analysis.effective_rank"] == ""
    with pytest.raises(ValueError, match=r"2 of 3 runs have no number in analysis\.effective_rank: .*/b, .*/c"):
        registry.observations("effective_rank")


def test_points_of_parts_and_kinds(study):
    registry = read_registry([study])
    points = registry.observations("validation.last.lm_loss")
    assert points.size_R.tolist() == [1010, 2010, 3010] and points.tokens_R.tolist() == [10_000, 20_000, 10_000]
    assert points.column_R.tolist() == [2.0, 3.0, 4.0] and points.column == "validation.last.lm_loss"
    assert registry.observations("last.lm_loss", ["decoder"]).size_R.tolist() == [1000, 2000, 3000]
    assert registry.observations("last.lm_loss", tokens="label").tokens_R.tolist() == [900] * 3
    assert registry.observations("last.lm_loss", ceiling=9.0).loss_R.tolist() == [7.0, 6.0, 5.0]
    assert registry.flops().tolist() == [1e20] * 3
    with pytest.raises(
        ValueError, match=r"no column|no run has a column 'parameters\.head'; there are parameters\.encoder"
    ):
        registry.observations("last.lm_loss", ["head"])


def test_arms_by_a_column(study):
    registry = read_registry([study])
    arms = registry.arms("laver")
    assert {name: names(arm) for name, arm in arms.items()} == {"laver": ["a", "b"], "baseline": ["c"]}
    assert {name: names(arm) for name, arm in registry.arms("seed").items()} == {"1": ["a"], "2": ["b"], "3": ["c"]}


def test_runs_chosen_by_a_value(study):
    change(study / "a", score=0.5)
    registry = read_registry([study])
    chosen = {("laver", "true"): "ab", ("laver", "false"): "c", ("seed", "2.0"): "b", ("config.load", "null"): "abc"}
    chosen |= {("score", "5e-1"): "a", ("data_path", '["shards"]'): "abc"}
    for (column, value), letters in chosen.items():
        assert names(registry.where(column, value)) == list(letters), column
    with pytest.raises(ValueError, match=r"no run has '7' in seed; there are 1, 2, 3"):
        registry.where("seed", "7")


def test_a_run_without_a_value_is_of_no_arm(study):
    change(study / "a", recipe="new")
    with pytest.raises(ValueError, match=r"2 of 3 runs have no value in recipe: .*/b, .*/c; mend these, or choose"):
        read_registry([study]).arms("recipe")


def test_one_directory_by_two_names_is_one_run(study):
    assert names(read_registry([study, study / "more" / ".."])) == ["a", "b", "c"]
    (study / "zz").symlink_to(study / "a")
    assert names(read_registry([study / "a", study / "zz"])) == ["a"]


def test_settings_that_differ_within_an_arm_are_found(study):
    write_run(study / "d", settings={"seed": 1, "mask_ratio": 0.3, "load": "hf:other"})
    arms = read_registry([study]).arms("laver")
    assert varying_settings(arms["laver"]) == ["config.mask_ratio"] and varying_settings(arms["baseline"]) == []


# --- runs with faults ----------------------------------------------------------------------------------


def never_saved(directory):
    directory.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (directory / name).write_text("")


def broken(text):
    def write(directory):
        directory.mkdir()
        (directory / "run_summary.json").write_text(text)

    return write


def changed(**changes):
    def write(directory):
        write_run(directory, settings={"seed": 9})
        change(directory, **changes)

    return write


def with_number(text, **changes):
    """A number that json.dumps cannot be asked for."""

    def write(directory):
        changed(**dict.fromkeys(changes, "HERE"))(directory)
        path = directory / "run_summary.json"
        path.write_text(path.read_text().replace('"HERE"', text))

    return write


def without(section, field):
    def write(directory):
        changed()(directory)
        summary = json.loads((directory / "run_summary.json").read_text())
        del summary[section][field]
        (directory / "run_summary.json").write_text(json.dumps(summary))

    return write


BAD_RUNS = {
    "stopped": (
        lambda at: write_run(at, iteration=60, counted_iterations=60),
        "unfinished",
        "is at iteration 60 of 100",
    ),
    "never saved": (never_saved, "unfinished", "has config.yaml and metrics.jsonl and no run_summary.json"),
    "nan": (changed(validation__last__lm_loss=None), "nan", "validation.last.lm_loss was NaN or infinite"),
    "nan in training": (changed(training__gram_loss=None), "nan", "training.gram_loss was NaN or infinite"),
    "duplicate": (lambda at: write_run(at, settings={"seed": 1}), "duplicate", "and seed 1, as the newer"),
    "torn": (broken('{"format": "lav'), "damaged", "run_summary.json cannot be read"),
    "a list": (broken("[]"), "damaged", "run_summary.json is list, not"),
    "other version": (changed(version=2), "damaged", "('laver_megatron run summary', 2), not"),
    "no tokens": (
        broken('{"format": "laver_megatron run summary", "version": 1}'),
        "damaged",
        "lacks iteration, counted_iterations, seed",
    ),
    "literal nan": (
        with_number("NaN", validation__last__lm_loss=0),
        "nan",
        "validation.last.lm_loss was NaN or infinite",
    ),
    "infinite": (with_number("1e999", training__loss=0), "nan", "training.loss was NaN or infinite"),
    "null in an added column": (changed(score=None), "nan", "score was NaN or infinite"),
    "nan in an added column": (with_number("NaN", analysis=0), "nan", "analysis was NaN or infinite"),
    "no decoder": (without("parameters", "decoder"), "damaged", "run_summary.json lacks parameters.decoder"),
    "no flops": (without("flops", "model"), "damaged", "lacks flops.model"),
    "text for parameters": (
        changed(parameters__decoder="abc"),
        "damaged",
        "has parameters.decoder 'abc', which must be",
    ),
    "text for tokens": (
        changed(tokens__total="1e9"),
        "damaged",
        "has tokens.total '1e9', which must be a number",
    ),
    "text for flops": (changed(flops__model="x"), "damaged", "has flops.model 'x', which must be a number"),
    "too large": (changed(flops__model=10**400), "damaged", "has flops.model of 1329 bits, which must be a number"),
    "nan for tokens": (with_number("NaN", tokens__total=0), "damaged", "has tokens.total nan, which must be a number"),
    "below 0": (changed(tokens__total=-5), "damaged", "has tokens.total -5, which must be a number of at least 0"),
    "half a seed": (changed(seed=1.5), "damaged", "has seed 1.5, which must be an integer"),
    "no time": (changed(time__written_at=5), "damaged", "has time.written_at 5, which must be a string"),
    "no hash": (changed(config_hash=None), "damaged", "has config_hash None, which must be a string"),
    "no config": (changed(config=None), "damaged", "lacks config"),
    "another state": (changed(state="done"), "damaged", "has state 'done', which must be finished or unfinished"),
    "deep": (broken("[" * 100_000), "damaged", "run_summary.json cannot be read"),
    "deep columns": (broken('{"a":' * 900 + "1" + "}" * 900), "damaged", "run_summary.json"),
    "sums of a part": (changed(counted_iterations=40), "damaged", "are sums over 40 of 100 iterations"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_a_run_with_a_fault_is_named_and_can_be_left_out(study, name):
    write, kind, reason = BAD_RUNS[name]
    directory = study / "z-bad"
    write(directory)
    with pytest.raises(ValueError) as raised:
        read_registry([study])
    message = str(raised.value)
    assert f"1 runs cannot be used (to leave them out: --leave-out {kind})" in message
    assert f": {kind}: " in message and reason in message
    assert str(study / ("a" if name == "duplicate" else "z-bad")) in message
    with pytest.raises(ValueError, match="cannot be used"):  # another kind does not help
        read_registry([study], [other for other in FAULTS if other != kind])
    registry = read_registry([study], [kind])
    assert len(registry.runs) == 3 and [fault.kind for fault in registry.left_out] == [kind]


def test_of_duplicates_the_newest_is_kept(study):
    write_run(study / "0-newer", settings={"seed": 1})
    change(study / "0-newer", time__written_at="2999-01-01T00:00:00+00:00")
    assert names(read_registry([study], ["duplicate"])) == ["0-newer", "b", "c"]
    change(study / "0-newer", time__written_at="1999-01-01T00:00:00+00:00")
    assert names(read_registry([study], ["duplicate"])) == ["a", "b", "c"]
    # An unfinished copy is no duplicate of a finished run.
    change(study / "a", state="unfinished")
    assert names(read_registry([study], ["unfinished"])) == ["0-newer", "b", "c"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda at: at / "nowhere", r"nowhere does not exist"),
        (lambda at: at / "file.txt", r"file\.txt is not a run_summary\.json"),
        (lambda at: at / "empty", r"no run_summary\.json in .*empty; every run writes one when it saves"),
    ],
)
def test_places_without_runs(tmp_path, make, message):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        read_registry([make(tmp_path)])


def test_unknown_faults_are_refused(study):
    with pytest.raises(ValueError, match=r"unknown faults to leave out: \['bad'\]; known are unfinished, nan"):
        read_registry([study], ["bad"])


def test_a_summary_reads_back_as_it_was_written(study):
    content = json.loads((study / "a" / "run_summary.json").read_text())
    run = read_registry([study / "a"]).runs[0]
    assert run.value("parameters.decoder") == content["parameters"]["decoder"]
    assert run.value("config.data_path") == '["shards"]' and run.value("config.load") is None
