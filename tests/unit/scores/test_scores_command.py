"""`laver scores` on the kits' own files: figures worked out by hand from their answers, and what it refuses."""

import csv
import json
import shutil
import sys
import zipfile

import pytest

from laver_megatron.__main__ import main
from laver_megatron.scores.sheets import number

# Right answers of 12, by hand; OCRBench in points, CV-Bench 2D of VLMEvalKit as the mean of its two sources.
LMMS_EVAL = {
    "OCRBench": (7, 9), "ChartQA": (50, 75), "TextVQA": (57.5, 82.5), "MMVP": (0, 400 / 6),
    "CV-Bench 2D": (75, 1000 / 12),
}  # fmt: skip
VLMEVALKIT = {
    "OCRBench": (7, 8), "ChartQA": (700 / 12, 100), "MMVP": (100 / 6, 400 / 6), "CV-Bench 2D": (50, 700 / 9),
    "RealWorldQA": (1000 / 12, 1100 / 12), "HallusionBench": (800 / 12, 1000 / 12),
}  # fmt: skip


def scores(capsys, *words) -> str:
    main(["scores", *map(str, words)])
    return capsys.readouterr().out


def table(capsys, tmp_path, *words) -> dict:
    path = tmp_path / "table.json"
    scores(capsys, *words, "--output", path)
    return json.loads(path.read_text())


def cells(found: dict, directory) -> dict[str, dict]:
    return {row["benchmark"]: row["directories"][str(directory)] for row in found["rows"]}


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as end:
        main(["scores", *map(str, words)])
    assert end.value.code == 2
    return capsys.readouterr().err


def pair(kits, kit):
    return kits / kit / "baseline", kits / kit / "laver"


def check(found, baseline, laver, expected):
    before, after = cells(found, baseline), cells(found, laver)
    assert before.keys() == after.keys() == expected.keys()
    for name, (first, second) in expected.items():
        assert before[name]["value"] == pytest.approx(first)
        assert after[name]["value"] == pytest.approx(second)
        assert after[name]["gain"] == pytest.approx(second - first)


def test_lmms_eval(kits, capsys):
    baseline, laver = pair(kits, "lmms_eval")
    found = table(capsys, kits, baseline, laver)
    check(found, baseline, laver, LMMS_EVAL)
    tests = {name: cell["test"] for name, cell in cells(found, laver).items()}
    # All that changed was gained: 2, 3, 3 and 1 questions, and 4 pairs: 2 / 2^k.
    assert {name: (test["method"][:4], test["p_value"]) for name, test in tests.items()} == {
        "OCRBench": ("McNe", 0.5), "ChartQA": ("McNe", 0.25), "TextVQA": ("sign", 0.25), "MMVP": ("McNe", 0.125),
        "CV-Bench 2D": ("McNe", 1.0),
    }  # fmt: skip
    assert {name: test["num_samples"] for name, test in tests.items()} == dict.fromkeys(LMMS_EVAL, 12) | {"MMVP": 6}
    assert any("OCRBench" in note and "the kit's score is 0.90, the mean of its samples 75.00" in note
               for note in found["notes"])  # of 12 questions where it divides by 1000  # fmt: skip


@pytest.mark.parametrize("kit", ["vlmevalkit_tsv", "vlmevalkit_xlsx"])
def test_vlmevalkit(kits, capsys, kit):
    if kit == "vlmevalkit_xlsx":
        pytest.importorskip("openpyxl")
    baseline, laver = pair(kits, kit)
    found = table(capsys, kits, baseline, laver)
    check(found, baseline, laver, VLMEVALKIT)
    p_values = {name: cell["test"] and cell["test"]["p_value"] for name, cell in cells(found, laver).items()}
    assert p_values == {
        "OCRBench": None, "ChartQA": 0.0625, "MMVP": 0.25, "CV-Bench 2D": 0.25, "RealWorldQA": 1.0,
        "HallusionBench": 0.5,
    }  # fmt: skip
    assert any("MMBench_TEST_EN" in note and "official_server" in note for note in found["notes"])


def test_averages(kits, capsys):
    baseline, laver = pair(kits, "vlmevalkit_tsv")
    averages = {it["name"]: it for it in table(capsys, kits, laver, baseline, "--baseline", baseline)["averages"]}
    assert list(averages) == ["OCR", "vision-centric", "general", "hallucination", "average"]
    for directory, place in ((baseline, 0), (laver, 1)):
        value = {name: pair[place] for name, pair in VLMEVALKIT.items()}
        value["OCRBench"] /= 10
        assert averages["OCR"]["values"][str(directory)] == pytest.approx((value["OCRBench"] + value["ChartQA"]) / 2)
        assert averages["average"]["values"][str(directory)] == pytest.approx(sum(value.values()) / 6)


def test_releases_without_status(kits, capsys):
    baseline, laver = pair(kits, "vlmevalkit_tsv")
    for path in (*baseline.rglob("status.json"), *laver.rglob("status.json")):
        path.unlink()
    found = table(capsys, kits, baseline, laver)
    check(found, baseline, laver, VLMEVALKIT)
    assert cells(found, laver)["MMVP"]["test"]["p_value"] == 0.25


def test_without_openpyxl(kits, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    baseline, laver = pair(kits, "vlmevalkit_xlsx")
    found = table(capsys, kits, baseline, laver)
    check(found, baseline, laver, VLMEVALKIT)
    assert cells(found, laver)["MMVP"]["test"] is None
    assert sum("pip install openpyxl; or score with PRED_FORMAT=tsv" in note for note in found["notes"]) == 5


def test_links_of_the_models_folder_count_once(kits, capsys):
    baseline, laver = pair(kits, "vlmevalkit_tsv")
    for path in (*laver.glob("T*/*"),):
        (laver / path.name).symlink_to(path.relative_to(laver))
    assert not any("results" in note for note in table(capsys, kits, baseline, laver)["notes"])


def test_the_newest_of_two_results(kits, capsys):
    baseline, laver = pair(kits, "lmms_eval")
    (old,) = laver.rglob("*_results.json")
    new = old.with_name("20270101_000000_results.json")
    content = json.loads(old.read_text())
    content["results"] = {"chartqa": {"alias": "chartqa", "relaxed_overall,none": 0.25}}
    new.write_text(json.dumps(content))
    found = table(capsys, kits, baseline, laver)
    assert cells(found, laver)["ChartQA"] == {"value": 25.0, "gain": -25.0, "test": None}
    assert cells(found, laver)["MMVP"]["value"] == pytest.approx(400 / 6)
    assert f"{laver}: ChartQA (lmms-eval) has 2 results; the newest is used, {new}" in found["notes"]


def test_other_samples_have_no_gain_and_no_part_in_averages(kits, capsys):
    baseline, laver = pair(kits, "lmms_eval")
    (path,) = laver.rglob("*_samples_chartqa.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    found = table(capsys, kits, baseline, laver)
    assert cells(found, laver)["ChartQA"]["gain"] is None
    assert "ChartQA" not in found["averages"][-1]["benchmarks"]
    assert any("3 of 12 are in the baseline alone, 0 of 9 are not in it" in note for note in found["notes"])


def test_a_single_sample_has_no_interval(kits, capsys):
    baseline, laver = pair(kits, "lmms_eval")
    for directory in (baseline, laver):
        (path,) = directory.rglob("*_samples_chartqa.jsonl")
        path.write_text(path.read_text().splitlines(keepends=True)[0])
    scores(capsys, baseline, laver, "--output", kits / "table.csv")
    (row,) = (row for row in csv.reader((kits / "table.csv").open()) if row[0] == "ChartQA")
    assert row[5:] == ["+25.00", "-", "1"]


def test_both_kits_in_one_folder_are_two_rows_and_count_once(kits, capsys):
    both = []
    for name in ("baseline", "laver"):
        shutil.copytree(kits / "vlmevalkit_tsv" / name, kits / "lmms_eval" / name / "vlmevalkit")
        both.append(kits / "lmms_eval" / name)
    found = table(capsys, kits, *both)
    assert [row["kit"] for row in found["rows"] if row["benchmark"] == "ChartQA"] == ["VLMEvalKit", "lmms-eval"]
    assert sorted(found["averages"][-1]["benchmarks"]) == sorted({*LMMS_EVAL, *VLMEVALKIT})
    ocr = found["averages"][0]["values"][str(both[1])]
    assert ocr == pytest.approx((0.8 + 100 + 82.5) / 3)


def test_unknown_benchmarks_are_shown_and_not_averaged(kits, capsys):
    baseline, laver = pair(kits, "lmms_eval")
    for directory, value in ((baseline, 0.25), (laver, 0.5)):
        (path,) = directory.rglob("*_results.json")
        content = json.loads(path.read_text())
        content["results"] |= {"new_task": {"alias": "new", "acc,none": value, "acc_stderr,none": 0.1}}
        content["results"] |= {"vague": {"alias": "vague", "acc,none": value, "f1,none": value}}
        path.write_text(json.dumps(content))
    found = table(capsys, kits, baseline, laver)
    assert cells(found, laver)["new_task"] == {"value": 0.5, "gain": 0.25, "test": None}
    assert "new_task" not in found["averages"][-1]["benchmarks"]
    assert sum("vague (lmms-eval) left out: 2 scores" in note and "acc,none, f1,none" in note
               for note in found["notes"]) == 2  # fmt: skip


def test_forms(kits, capsys):
    baseline, laver = pair(kits, "vlmevalkit_tsv")
    text = scores(capsys, baseline, laver, "--output", kits / "table.csv")
    assert "+41.67" in text and "p: McNemar, exact, over the same samples, two-sided, not corrected for 5" in text
    rows = list(csv.reader((kits / "table.csv").open()))
    assert rows[0] == ["benchmark", "type", "kit", str(baseline), str(laver), "gain", "95%", "p"]
    assert rows[1][:6] == ["OCRBench", "OCR", "VLMEvalKit", "7.00", "8.00", "+1.00"]
    assert rows[-1][0] == "average"
    scores(capsys, baseline, "--output", kits / "table.md")
    lines = (kits / "table.md").read_text().splitlines()
    assert lines[0] == f"| benchmark | type | kit | {baseline} |"
    assert lines[2] == "| OCRBench | OCR | VLMEvalKit | 7.00 |"


def test_folders_that_are_refused(kits, capsys):
    baseline, laver = pair(kits, "lmms_eval")
    empty, unknown = kits / "empty", kits / "unknown"
    empty.mkdir()
    unknown.mkdir()
    (unknown / "scores.txt").write_text("1")
    assert "is empty" in refused(capsys, baseline, empty)
    assert "no results of lmms-eval" in refused(capsys, unknown) and "scores.txt" in refused(capsys, unknown)
    assert "absent" in refused(capsys, kits / "absent")
    assert "2 models (exports__baseline, exports__laver)" in refused(capsys, kits / "lmms_eval")
    assert "in common" in refused(capsys, baseline, kits / "vlmevalkit_tsv" / "laver")
    assert "is none of" in refused(capsys, baseline, "--baseline", laver)
    assert "named twice" in refused(capsys, baseline, baseline)
    assert ".csv, .json, .md" in refused(capsys, baseline, "--output", kits / "table.txt")
    assert "no such folder" in refused(capsys, baseline, "--output", kits / "absent" / "table.md")


def test_damaged_files(kits, capsys):
    baseline, laver = pair(kits, "lmms_eval")
    (samples,) = laver.rglob("*_samples_chartqa.jsonl")
    samples.write_text('{"doc_id": 0}\n')
    found = table(capsys, kits, baseline, laver)
    assert cells(found, laver)["ChartQA"]["gain"] == 25
    assert any("no test" in note and "line 1" in note for note in found["notes"])
    (results,) = laver.rglob("*_results.json")
    results.write_text('{"results": [1]}')
    assert "is it a file of lmms-eval?" in refused(capsys, laver)
    results.write_text("{")
    assert "cannot be read" in refused(capsys, laver)
    status = next((kits / "vlmevalkit_tsv" / "laver").rglob("status.json"))
    status.write_text('{"datasets": {}}')
    assert "is it a file of VLMEvalKit?" in refused(capsys, kits / "vlmevalkit_tsv" / "laver")


def test_infinite_scores_are_none(kits, capsys):
    baseline, laver = pair(kits, "lmms_eval")
    (results,) = laver.rglob("*_results.json")
    content = json.loads(results.read_text())
    content["results"]["chartqa"]["relaxed_overall,none"] = float("inf")
    results.write_text(json.dumps(content))
    found = table(capsys, kits, baseline, laver)
    (row,) = (row for row in found["rows"] if row["benchmark"] == "ChartQA")
    assert list(row["directories"]) == [str(baseline)]
    assert any("chartqa" in note and "left out: 0 scores" in note for note in found["notes"])
    assert number("inf") is None and number(10**400) is None and number("0.5") == 0.5


@pytest.mark.parametrize("damage", ["content", "xml"])
def test_damaged_sheets_of_samples(kits, capsys, damage):
    """Of a bad copy zlib complains, of an unfinished sheet the XML parser."""
    pytest.importorskip("openpyxl")
    baseline, laver = pair(kits, "vlmevalkit_xlsx")
    for path in {it.resolve() for it in laver.rglob("*ChartQA_TEST_results.xlsx")}:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if damage == "content" else zipfile.ZIP_STORED) as archive:
            for name, content in files.items():
                archive.writestr(name, b"<worksheet" if damage == "xml" and "sheet1" in name else content)
            place = archive.getinfo("xl/worksheets/sheet1.xml").header_offset + 60
        if damage == "content":
            broken = bytearray(path.read_bytes())
            broken[place : place + 60] = bytes(60 * [0x5A])
            path.write_bytes(broken)
    found = table(capsys, kits, baseline, laver)
    assert cells(found, laver)["ChartQA"]["gain"] == pytest.approx(500 / 12)
    assert any("no test" in note and "ChartQA_TEST_results.xlsx cannot be read" in note for note in found["notes"])
