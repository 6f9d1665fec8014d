"""Which checkpoint a run goes on from, by the quick check."""

import json
import os
from pathlib import Path

import pytest

from laver_megatron.checkpoint.choice import choose
from laver_megatron.checkpoint.manifest import ALGORITHM, describe
from laver_megatron.config.fields import ConfigError
from tests.attacks import FILES, cut, flip, renew_manifest, write_checkpoint


@pytest.fixture
def three(tmp_path):
    return [write_checkpoint(tmp_path, iteration) for iteration in (5, 10, 10_000_000)]


DAMAGES = [
    (name, damage)
    for name in (*FILES, "manifest.json")
    for damage in (flip, cut, Path.unlink)
    if (name, damage) != ("__0_0.distcp", flip)  # found by the ranks together, see test_fallback.py
]


@pytest.mark.parametrize("name, damage", DAMAGES, ids=lambda it: it if isinstance(it, str) else it.__name__)
def test_a_damaged_newest_is_passed_over_by_name(tmp_path, three, name, damage):
    damage(three[2] / name)
    if name == "manifest.json" and damage is flip:  # a digit of a size or checksum, or the form of the file
        pytest.raises(ConfigError, choose, three[2])
    choice = choose(tmp_path)
    assert choice.checkpoint == three[1]
    assert len(choice.passed_over) == 1 and str(three[2]) in choice.passed_over[0]
    with pytest.raises(ConfigError, match="iter_10000000.*--strict-load goes on from the newest"):
        choose(tmp_path, strict=True)


def test_several_are_passed_over(tmp_path, three):
    (three[2] / "manifest.json").unlink()
    cut(three[1] / "__0_0.distcp")
    choice = choose(tmp_path)
    assert choice.checkpoint == three[0] and len(choice.passed_over) == 2


def test_none_is_whole(tmp_path, three):
    """A run that lost all its checkpoints does not start anew as if it had none."""
    for path in three:
        cut(path / "hf/config.json")
    with pytest.raises(ConfigError) as raised:
        choose(tmp_path)
    assert len(raised.value.problems) == 3 and "no checkpoint there is whole" in raised.value.problems[-1]


def test_one_that_is_named_is_taken_or_refused(three):
    assert choose(three[1]).checkpoint == three[1]
    cut(three[1] / "run.json")
    with pytest.raises(ConfigError, match=f"{three[1]}/run.json has 1 bytes"):
        choose(three[1])


def test_what_the_whole_check_found_is_passed_over(tmp_path, three):
    choice = choose(tmp_path, damaged={three[2]: "its checksum differs"})
    assert choice.checkpoint == three[1] and choice.passed_over == ("its checksum differs",)


def test_latest_is_a_hint(tmp_path, three):
    for said in ("5", "20000000", "nonsense", "\0", "9" * 5000):
        (tmp_path / "latest").write_text(said)
        choice = choose(tmp_path)
        assert choice.checkpoint == three[2]
        lost = [f"{tmp_path}/latest says 20000000, but there is no such checkpoint"] if said == "20000000" else []
        assert list(choice.passed_over) == lost


def test_latest_may_be_a_pipe(tmp_path, three):
    """Nobody waits for it."""
    os.mkfifo(tmp_path / "latest")
    assert choose(tmp_path).checkpoint == three[2]


def test_no_checkpoints(tmp_path):
    write_checkpoint(tmp_path, 7).rename(tmp_path / ".iter_0000007.incomplete")
    assert choose(tmp_path).checkpoint is None and choose(tmp_path / "nowhere").checkpoint is None


def test_a_manifest_that_is_nonsense(tmp_path, three):
    digest = f'"{ALGORITHM}0"'
    for content in (
        "", "[]", "null", '{"run.json": [1]}', '{"run.json": [2, "md5:0"]}', f'{{"run.json": [1e999, {digest}]}}',
        f'{{"run.json": ["2", {digest}]}}', '{"run.json": [2, 0]}', '{"a":' * 100_000, f'{{"\\ud800": [2, {digest}]}}',
    ):  # fmt: skip
        (three[2] / "manifest.json").write_text(content)
        choice = choose(tmp_path)
        assert choice.checkpoint == three[1] and f"{three[2]}/manifest.json" in choice.passed_over[0]


def change_manifest(checkpoint, change):
    path = checkpoint / "manifest.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_manifest_does_not_list(tmp_path, three, name):
    change_manifest(three[2], lambda entries: entries.pop(name))
    choice = choose(tmp_path)
    assert choice.checkpoint == three[1]
    assert f"{three[2]}/manifest.json does not list {name}" in choice.passed_over[0]
    (three[2] / name).unlink()
    needed = name in (".metadata", "run.json", "hf/config.json")
    assert choose(tmp_path).checkpoint == three[1 if needed else 2]


def test_a_manifest_that_lists_nothing(tmp_path, three):
    change_manifest(three[2], dict.clear)
    assert "does not list .metadata and 4 more" in choose(tmp_path).passed_over[0]


@pytest.mark.parametrize("name", ["hf/manifest.json", ".hidden", "a\x1b[2Jb"])
def test_a_file_that_was_put_into_a_checkpoint(tmp_path, three, name):
    (three[2] / name).touch()
    shown = "a\\x1b[2Jb" if "\x1b" in name else name
    assert f"{three[2]}/manifest.json does not list {shown}," in choose(tmp_path).passed_over[0]


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "hf/../../x", "link", "folder/x"])
def test_a_name_that_leads_outside(tmp_path, three, name):
    """Though size and checksum are those of the file there."""
    outside = tmp_path / "x"
    outside.write_text("x")
    if name == "link":
        (three[2] / "link").symlink_to(outside)
    (three[2] / "folder").symlink_to(tmp_path)
    change_manifest(three[2], lambda entries: entries.update({name: describe(outside)}))
    choice = choose(tmp_path)
    assert choice.checkpoint == three[1]
    assert f"names {name}, which lies outside the checkpoint" in choice.passed_over[0]


def test_links_that_stay_inside(tmp_path, three):
    """The folder of checkpoints may be a link, and a file may be one to another file of its checkpoint."""
    (three[2] / "again.json").symlink_to("run.json")
    renew_manifest(three[2])
    (tmp_path / "linked").symlink_to(three[2])
    assert choose(tmp_path).checkpoint == three[2] and choose(tmp_path / "linked").checkpoint == tmp_path / "linked"
