import pyarrow
import pytest
from pyarrow import parquet as pq

from laver_megatron.shards.parquet import RATINGS
from tests.unit.shards.form import encoded, jpeg, noise, turns


def finevision(path, rows, row_group_size=3, **columns):
    """rows: (pictures, [(user, assistant)], ratings of the turns) each."""
    table = {
        "images": [[{"bytes": content, "path": None} for content in pictures] for pictures, *_ in rows],
        "texts": [[{"user": user, "assistant": assistant} for user, assistant in texts] for _, texts, _ in rows],
        "source": ["here"] * len(rows),
        **{column: [ratings for *_, ratings in rows] for column in RATINGS.values()},
        "relevance_min": [None] * len(rows),
        **columns,
    }
    pq.write_table(pyarrow.table(table), path, row_group_size=row_group_size)
    return path


def row(number, ratings=(5,), num_pictures=1):
    pictures = [jpeg((20 + number, 30 + part)) for part in range(num_pictures)]
    return pictures, [(f"Q{number}.{n}", f"A{number}.{n}") for n in range(len(ratings))], list(ratings)


def questions(samples):
    return [
        [turn["value"] for turn in sample["json"]["conversations"] if turn["from"] == "human"]
        for sample in samples.values()
    ]


def test_finevision(tmp_path, make):
    rows = [row(0), row(1, (1, 2, 3)), row(2, num_pictures=2), row(3, num_pictures=0), row(4)]
    samples = make(finevision(tmp_path / "a.parquet", rows))
    assert list(samples) == [f"{number:09d}" for number in range(5)]
    assert samples["000000001"]["json"] == {
        "id": "000000001",
        "source": "here",
        "conversations": turns("<image>\nQ1.0", "A1.0") + turns("Q1.1", "A1.1") + turns("Q1.2", "A1.2"),
    }
    assert questions(samples)[2:4] == [["<image>\n<image>\nQ2.0"], ["Q3.0"]]
    for number, (pictures, *_) in enumerate(rows):
        found = {name: content for name, content in samples[f"{number:09d}"].items() if name != "json"}
        assert list(found.values()) == pictures


@pytest.mark.parametrize("rating", RATINGS)
def test_a_least_rating_drops_turns(tmp_path, make, rating):
    rows = [row(0, (5, 3, 4)), row(1, (3,)), row(2, (3, 5)), row(3, (None, 4)), row(4, ())]
    others = {column: [[5] * len(ratings) for *_, ratings in rows] for key, column in RATINGS.items() if key != rating}
    source = finevision(tmp_path / "a.parquet", rows, **others)
    samples = make(source, min_ratings={rating: 4}, max_bad_fraction=1)
    assert questions(samples) == [["<image>\nQ0.0", "Q0.2"], ["<image>\nQ2.1"], ["<image>\nQ3.1"]]
    report = make.report
    assert (report.num_dropped_turns, report.num_unwanted) == (4, 1)
    assert report.faults == {"no_turns": 1}  # row 4 never had a turn
    assert "4 turns, and with them 1 samples" in report.summary(has_tokenizer=False)


def test_filters_are_no_faults_and_ratings_must_be_there(tmp_path, make):
    source = finevision(tmp_path / "a.parquet", [row(0, (1,)), row(1, (5,))])
    assert len(make(source, min_ratings={"formatting": 5})) == 1  # half of the samples, none allowed to be bad
    table = pq.read_table(source).drop_columns(["relevance_ratings"])
    pq.write_table(table, source)
    with pytest.raises(ValueError, match="no column relevance_ratings; leave out --min-relevance"):
        make(source, min_ratings={"relevance": 1}, output="other")
    table = table.append_column("relevance_ratings", pyarrow.array([None, [4]], pyarrow.list_(pyarrow.int64())))
    pq.write_table(table, source)
    assert questions(make(source, min_ratings={"relevance": 1}, output="third")) == [["<image>\nQ1.0"]]


def test_slices_that_do_not_fit_row_groups(tmp_path, make):
    source = finevision(tmp_path / "a.parquet", [row(number) for number in range(10)], row_group_size=4)
    whole = make(source)
    assert make(source, samples_per_shard=3, output="other") == whole
    assert len(list((tmp_path / "other").glob("*.tar"))) == 4


def test_llava_onevision(tmp_path, make):
    pictures = [{"bytes": jpeg(), "path": "a.jpg"}, None, {"bytes": encoded(noise(), "BMP"), "path": None}]
    table = {
        "id": ["a/1", "b", "c"],
        "image": pictures,
        "conversations": [turns(), turns("No picture"), turns("Look: <image>")],
        "data_source": ["one", "two", None],
    }
    folder = tmp_path / "LLaVA-OneVision-Data" / "ai2d"
    folder.mkdir(parents=True)
    pq.write_table(pyarrow.table(table), folder / "train-00000-of-00001.parquet")
    (folder / "dataset_info.json").write_text("{}")
    samples = make(folder.parent)
    assert [sample["json"] for sample in samples.values()] == [
        {"id": "a/1", "source": "one", "conversations": turns()},
        {"id": "b", "source": "two", "conversations": turns("No picture")},
        {"id": "c", "conversations": turns("Look: <image>")},
    ]
    assert [sorted(sample) for sample in samples.values()] == [["jpg", "json"], ["json"], ["json", "png"]]


def test_faults_of_rows(tmp_path, make):
    table = {
        "images": [
            [{"bytes": None, "path": "/etc/passwd"}],
            [None, {"bytes": jpeg(), "path": None}],
            [{"bytes": b"x" * 9, "path": None}],
            None,
            [],
        ],
        "texts": [[{"user": "Q", "assistant": "A"}]] * 3 + [None, [{"user": None, "assistant": "A"}]],
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pyarrow.table(table), path)
    with pytest.raises(ValueError, match="5 of 5 samples cannot be used"):
        make(path)
    with pytest.raises(ValueError, match="no sample can be used"):
        make(path, max_bad_fraction=1, output="other")


def test_what_a_row_says_beside_its_turns(tmp_path, make):
    """Arrow writes every key of the schema in every row: null is absent."""
    turn = {"from": "human", "value": "A", "role": None, "content": None, "loss": None}
    answer = {"from": None, "value": None, "role": "assistant", "content": "B", "loss": None}
    rows = [
        {"id": "c", "system": "Be terse.", "conversations": [turn, answer], "video": None, "score": 1.0},
        {"id": "d", "system": None, "conversations": [turn, {**answer, "loss": False}, turn, answer], "video": None},
        {"id": "b", "system": None, "conversations": [turn, answer], "video": "a.mp4", "score": None},
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pyarrow.Table.from_pylist(rows), path)
    samples = make(path, max_bad_fraction=1)
    said = {sample["json"]["id"]: sample["json"]["conversations"] for sample in samples.values()}
    assert said["c"] == [{"from": "system", "value": "Be terse."}, *turns("A", "B")]
    assert said["d"][1] == {"from": "gpt", "value": "B", "loss": False} and len(said["d"]) == 4
    assert make.report.faults == {"video_or_audio": 1}
    assert make.report.other_keys == {"score": 2}  # a column that is never read, in each sample


def test_rows_without_pictures_and_columns_without_values(tmp_path, make):
    nothing = {"bytes": None, "path": None}
    rows = [
        {"image": nothing, "images": [None], "conversations": turns("A", "B"), "texts": None, "extra": None},
        {"image": nothing, "images": [nothing], "conversations": turns("A", "B"), "texts": None, "extra": None},
        {"image": None, "images": [], "conversations": turns("Lost", "Lost"), "extra": None,
         "texts": [{"user": "A", "assistant": "B"}]},
    ]  # fmt: skip
    types = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {name: [row[name] for row in rows] for name in ("conversations", "texts", "extra")}
    for name, kind in (("image", types), ("images", pyarrow.list_(types))):
        columns[name] = pyarrow.array([row[name] for row in rows], kind)
    path = tmp_path / "a.parquet"
    pq.write_table(pyarrow.table(columns), path)
    samples = make(path)
    assert [sample["json"]["conversations"] for sample in samples.values()] == [turns("A", "B")] * 3
    assert make.report.other_keys == {"conversations beside texts": 1}


def test_other_files(tmp_path, make):
    path = tmp_path / "a.parquet"
    pq.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match="has the columns text; expected `images` and `texts`"):
        make(path)
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        make(path)
