"""Plain points: what is read, and what is refused with its line."""

import pytest

from laver_megatron.studies.fitted_study import FitSettings, fit_study
from laver_megatron.studies.study import ALL_RUNS, study_of_csv
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
        ("N,D,loss\n1e9,1e9,2\n1e9,many,2\n", "line 3: D is 'many', no number"),
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
