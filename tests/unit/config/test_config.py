"""The configuration: precedence, types, names that don't exist, and what is written back."""

import contextlib
import io
import json
import socket
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from laver_megatron.config import command_line
from laver_megatron.config.command_line import Invocation, from_command_line, load_config, read_command_line
from laver_megatron.config.fields import PRESETS, Config, ConfigError, all_fields, field_types

REQUIRED = {
    "data_path": ["shards/*.tar"],
    "seq_length": 256,
    "visual_seq_length": 128,
    "train_iters": 40,
    "run_dir": "runs/test",
}


@pytest.fixture
def config_file(tmp_path):
    """Writes a YAML file with the required fields and these; returns its path."""

    def write(text: str = "", **fields) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**REQUIRED, **fields}) + text)
        return str(path)

    return write


def problems_of(*argv: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_command_line(argv)
    return caught.value.problems


def required_flags() -> list[str]:
    return [
        "--data-path", "a.tar", "--seq-length", "8", "--visual-seq-length", "4", "--train-iters", "2",
        "--run-dir", "runs/test",
    ]  # fmt: skip


def test_defaults_and_flags_alone():
    config = load_config(required_flags())
    assert config.data.data_path == ("a.tar",)
    assert (config.data.seq_length, config.training.train_iters) == (8, 2)
    assert config.model.freeze == ("encoder",)
    assert config.training.lr == 2e-5


def test_precedence(config_file):
    # Four fields that the preset sets, each decided one level higher.
    path = config_file(preset="official-settings", ema_momentum=0.9, centre_momentum=0.5)
    config = load_config(["--config", path, "--centre-momentum", "0.25"])
    assert all_fields()["mask_sampling"].default == "bernoulli"
    assert config.objective.mask_sampling == "fixed"
    assert config.objective.ema_momentum == 0.9
    assert config.objective.centre_momentum == 0.25
    assert config.objective.gram_weight == 1.0


def test_preset_flag_beats_preset_of_the_file(config_file):
    config = load_config(["--config", config_file(preset="official-settings"), "--preset", "paper"])
    assert config.model.positions == "2d"
    assert config.objective.centre_momentum is None
    config = load_config(["--config", config_file(preset="official-settings"), "--preset", "none"])
    assert config.objective.mask_sampling == "bernoulli"


def test_preset_flag_beats_the_file_and_flags_beat_it(config_file):
    path = config_file(mask_sampling="bernoulli", ema_momentum=0.5, gram_weight=3.0)
    config = load_config(["--config", path, "--preset", "official-settings", "--ema-momentum", "0.75"])
    assert (config.objective.mask_sampling, config.objective.ema_momentum, config.objective.gram_weight) == (
        "fixed",
        0.75,
        3.0,
    )
    assert load_config(["--config", path, "--preset", "none"]).objective.ema_momentum == 0.5


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_values_of_the_right_type(config_file, name):
    config = load_config(["--config", config_file(preset=name)])
    for field, value in PRESETS[name].items():
        assert config.flat()[field] == value


def test_official_settings(config_file):
    config = load_config(["--config", config_file(preset="official-settings")])
    assert (config.objective.mask_sampling, config.objective.mask_ratio, config.objective.mask_ratio_schedule) == (
        "fixed",
        0.05,
        "cosine",
    )
    assert (config.objective.ema_momentum, config.objective.ema_momentum_schedule, config.objective.ema_interval) == (
        0.95,
        "cosine",
        0.02,
    )
    assert (config.objective.centre_momentum, config.model.positions, config.objective.gram_loss) == (
        0.9,
        "mrope",
        "cga",
    )


def test_numbers_that_yaml_reads_as_text(config_file):
    path = config_file("lr: 2e-5\nglobal_batch_size: 1e2\nadam_eps: 1E-6\nema_interval: 0.02\n")
    config = load_config(["--config", path])
    assert (config.training.lr, config.training.adam_eps, config.objective.ema_interval) == (2e-5, 1e-6, 0.02)
    assert config.data.global_batch_size == 100
    assert isinstance(config.data.global_batch_size, int)


def test_ema_interval_is_an_int_or_a_share(config_file):
    for text, value in (("3", 3), ("0.02", 0.02), ("1.0", 1)):
        interval = load_config(["--config", config_file(), "--ema-interval", text]).objective.ema_interval
        assert interval == value
        assert isinstance(interval, type(value))


def test_large_integers_keep_their_digits(config_file):
    assert load_config(["--config", config_file(), "--seed", str(2**62 + 1)]).training.seed == 2**62 + 1
    assert load_config(["--config", config_file(seed=2**62 + 1)]).training.seed == 2**62 + 1


def test_booleans_lists_and_none(config_file):
    path = config_file(sequence_parallel=True, valid_data_path=["v.tar"], wandb_project="p", freeze=[])
    config = load_config(["--config", path])
    assert config.parallel.sequence_parallel
    assert config.data.valid_data_path == ("v.tar",)
    assert config.model.freeze == ()
    overridden = load_config(
        ["--config", path, "--no-sequence-parallel", "--valid-data-path", "none", "--wandb-project", "None",
         "--freeze", "encoder", "decoder", "--encoder-feature-layer", "-1"]
    )  # fmt: skip
    assert not overridden.parallel.sequence_parallel
    assert overridden.data.valid_data_path is None
    assert overridden.run.wandb_project is None
    assert overridden.model.freeze == ("encoder", "decoder")
    assert overridden.model.encoder_feature_layer == -1
    assert load_config(["--config", path, "--freeze", "none"]).model.freeze == ()


def test_none_is_a_choice_of_gram_loss(config_file):
    assert load_config(["--config", config_file(), "--gram-loss", "none"]).objective.gram_loss == "none"
    assert load_config(["--config", config_file(gram_loss=None)]).objective.gram_loss == "none"


def test_one_path_needs_no_list(config_file):
    assert load_config(["--config", config_file(data_path="one.tar")]).data.data_path == ("one.tar",)


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--tensor-model-paralell-size", "--tensor-model-parallel-size"),
        ("--mask_ratio", "--mask-ratio"),
        ("--no-sequence-paralel", "--no-sequence-parallel"),
        ("--dryrun", "--dry-run"),
        ("--micro-batchsize=3", "--micro-batch-size"),
    ],
)
def test_unknown_flag_names_the_nearest(config_file, argument, nearest):
    problem = problems_of("--config", config_file(), argument)[0]
    assert problem == f"unknown flag {argument.split('=')[0]}; did you mean {nearest}?"


def test_abbreviated_flags_are_unknown(config_file):
    assert problems_of("--config", config_file(), "--tensor-model-parallel", "2")[0].startswith("unknown flag")


def test_unknown_key_names_the_nearest(config_file):
    path = config_file(mask_ratios=0.4, **{"train-iter": 3})
    problems = problems_of("--config", path)
    assert f"{path}: unknown key mask_ratios; did you mean mask_ratio?" in problems
    assert f"{path}: unknown key train-iter; did you mean train_iters?" in problems


def test_unlike_anything(config_file):
    assert problems_of("--config", config_file(), "--xyzzy") == ("unknown flag --xyzzy",)


def test_stray_words(config_file):
    assert "runs/demo" in problems_of("--config", config_file(), "runs/demo")[0]


STYLE = ("--lr-decay-style", "wsd")


def test_all_problems_together(config_file):
    path = config_file("mask_sampling: sometimes\ntypo_key: 1\n", lr="fast", laver="yes please", seed=1.5)
    problems = problems_of("--config", path, "--positions", "3d", "--bogus", "--dry-run", "none", *STYLE)
    for expected in (
        "unknown flag --bogus",
        f"{path}: unknown key typo_key",
        f"{path}: lr: expected a number, not 'fast'",
        f"{path}: laver: expected true or false, not 'yes please'",
        f"{path}: seed: expected an integer, not 1.5",
        f"{path}: mask_sampling: 'sometimes' is not one of bernoulli, fixed",
        "--positions: '3d' is not one of 2d, 1d, mrope; did you mean 2d?",
        "--lr-decay-style: 'wsd' is not one of cosine, linear, constant, WSD; did you mean WSD?",
        "--dry-run: 'none' is not a number of processes",
    ):
        assert expected in problems
    assert len(problems) == 9


def test_missing_fields_are_named():
    problems = problems_of("--train-iters", "x")
    assert any(problem.startswith("data_path is missing: give --data-path") for problem in problems)
    assert any(problem.startswith("run_dir is missing") for problem in problems)
    # A field that is given badly is not missing as well.
    assert [problem for problem in problems if "train" in problem] == ["--train-iters: expected a number, not 'x'"]


def test_flag_without_its_value(config_file):
    path = config_file()
    assert problems_of("--config", path, "--lr") == ("--lr: no value is given",)
    assert problems_of("--config", path, "--seed", "--freeze", "--lr", "x", "--bogus") == (
        "unknown flag --bogus",
        "--seed: no value is given",
        "--freeze: no value is given",
        "--lr: expected a number, not 'x'",
    )
    # Required ones are given badly, not missing; what else is missing is still said.
    assert problems_of(*required_flags()[2:], "--data-path") == ("--data-path: no value is given",)
    assert {problem.split()[0] for problem in problems_of("--train-iters")} == {
        "--train-iters:", "data_path", "seq_length", "run_dir"
    }  # fmt: skip
    assert problems_of("--lr", "x", "--config") == ("--config: no value is given", "--lr: expected a number, not 'x'")
    assert problems_of("--config", path, "--laver=yes") == (
        "argument --laver/--no-laver: ignored explicit argument 'yes'",
    )


def test_empty_text(config_file):
    assert problems_of("--config", config_file(), "--run-dir", "") == ("--run-dir: is empty",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: nan\n", "lr: expected a number"),
        ("lr: .inf\n", "lr: expected a number"),
        ("seed: true\n", "seed: expected a number"),
        ("load: 5\n", "load: expected text"),
        ("seed: null\n", "seed: cannot be none"),
        ("freeze: [encoder, brain]\n", "freeze: 'brain' is not one of encoder, connector, decoder, heads"),
    ],
)
def test_wrong_types(config_file, text, expected):
    assert expected in problems_of("--config", config_file(text))[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- a\n- b\n", "expected `key: value` lines, found a list"),
        ("lr: [\n", "not valid YAML"),
        ("lr: 1\nlr: 2\n", "'lr' is given twice"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, expected):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    (problem,) = problems_of("--config", str(path))  # nothing is said to be missing from what was not read
    assert expected in problem


def test_file_that_is_not_there(tmp_path):
    (problem,) = problems_of("--config", str(tmp_path / "no.yaml"))
    assert "No such file" in problem


def test_exit_code_and_message_without_traceback(capsys):
    with pytest.raises(SystemExit) as caught:
        from_command_line(["--lr", "x"])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "--lr: expected a number" in output.err
    assert "Traceback" not in output.err


@pytest.mark.parametrize(
    ("environ", "beginning"),
    [
        ({}, "1 problem"),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, "1 problem"),
        ({"RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"}, None),
        ({"RANK": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, "node 1 (HOST): 1 problem"),
        ({"RANK": "9", "LOCAL_RANK": "1", "GROUP_RANK": "1"}, None),
        # Without a launcher's LOCAL_RANK there is only the rank to go by.
        ({"RANK": "1"}, None),
    ],
)
def test_one_process_of_each_node_speaks_first(config_file, capsys, monkeypatch, environ, beginning):
    """The others wait for the launcher to end them; they speak only if it does not, for then nobody else has."""

    def end(seconds):
        raise SystemExit("ended while waiting")

    monkeypatch.setattr(time, "sleep", end)
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        from_command_line(["--config", config_file(), "--lr", "x"])
    output = capsys.readouterr().err
    if beginning is None:
        assert caught.value.code == "ended while waiting" and output == ""
    else:
        assert caught.value.code == 2 and output.startswith(beginning.replace("HOST", socket.gethostname()))


def test_print_config_round_trips(config_file, capsys, tmp_path):
    path = config_file(preset="official-settings", data_path=["a b.tar", "2e5", "x: y"], load="hf:dir")
    with pytest.raises(SystemExit) as caught:
        from_command_line(["--config", path, "--print-config", "--lr", "3e-4"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(printed)
    assert load_config(["--config", str(resolved)]) == load_config(["--config", path, "--lr", "3e-4"])
    assert [line for line in printed.splitlines() if line.startswith("#")] == [
        "# start", "# model", "# parallel", "# engine", "# data", "# objective", "# training", "# run", "# reliability"
    ]  # fmt: skip
    assert set(yaml.safe_load(printed)) == set(all_fields())


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=12)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.processes
@settings(max_examples=50, deadline=None)
@given(paths=st.lists(TEXT, min_size=1, max_size=3), lr=FLOAT, seed=st.integers(), project=TEXT)
def test_to_yaml_round_trips_any_value(tmp_path_factory, paths, lr, seed, project):
    words = ("none", "null", "~")
    if any(text.strip().lower() in words for text in (*paths, project)):
        return  # these words clear a value, by design
    config = Config.of(
        data_path=tuple(paths), seq_length=8, visual_seq_length=4, train_iters=1, run_dir="r", lr=lr, seed=seed,
        wandb_project=project,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(["--config", str(path)]) == config


def test_help_names_every_field_with_its_default():
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as caught:
        from_command_line(["--help"])
    assert caught.value.code == 0
    text = " ".join(output.getvalue().split())
    for name in all_fields():
        assert "--" + name.replace("_", "-") in text
    assert "(default: 2e-05)" in text
    assert "(required)" in text
    assert "(default: as is usual for its kind) --attention" in text  # said once
    for usage in ("--lr FLOAT highest", "--data-path STR [STR ...] training", "--config FILE YAML"):
        assert usage in text
    assert "%" not in command_line.build_parser().usage


def test_every_field_has_help_and_a_readable_type():
    types = field_types()
    for item in all_fields().values():
        assert item.metadata["help"], item.name
        assert set(types[item.name].scalars) <= {bool, int, float, str}, item.name


def test_world_size(config_file):
    def world_size(environ: dict[str, str], *flags: str) -> int:
        return read_command_line(["--config", config_file(), *flags]).world_size(environ)

    layout = ("--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "2")
    assert world_size({}, *layout) == 1
    assert world_size({"WORLD_SIZE": "16"}, *layout) == 16
    assert world_size({}, *layout, "--dry-run") == 8
    assert world_size({"WORLD_SIZE": "16"}, *layout, "--dry-run") == 16
    assert world_size({"WORLD_SIZE": "16"}, *layout, "--dry-run", "64") == 64


def test_invocation_flags_are_not_settings(config_file):
    invocation = read_command_line(["--config", config_file(), "--dry-run", "--print-config"])
    assert isinstance(invocation, Invocation)
    assert invocation.dry_run
    assert invocation.print_config
    assert not {"dry_run", "print_config", "config"} & set(all_fields())


EXAMPLES = Path(__file__).parents[3] / "examples"


def test_schema_says_what_the_fields_say(capsys):
    """The committed file is what --print-schema prints, without any other setting."""
    with pytest.raises(SystemExit) as caught:
        from_command_line(["--print-schema"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert printed == (EXAMPLES / "config.schema.json").read_text(), "write it anew with --print-schema"
    keys = json.loads(printed)["properties"]
    assert keys.keys() == all_fields().keys()
    assert keys["seq_length"] == {
        "description": "tokens of a pack in the language-model stream, visual tokens included",
        "type": "integer",
        "minimum": 1,
    }
    assert keys["centre_momentum"]["anyOf"] == [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}]
    assert keys["attention"]["enum"] == ["mixed", "causal"] and keys["attention"]["default"] == "mixed"
    assert [form["type"] for form in keys["data_path"]["anyOf"]] == ["string", "array"]


# Overrides by name, not a configuration.
ARMS = {EXAMPLES / "ablation" / name for name in ("arms.yaml", "arms_paper_values.yaml", "controls.yaml")}


@pytest.mark.parametrize("file", sorted({*EXAMPLES.rglob("*.yaml")} - ARMS), ids=lambda file: file.name)
def test_examples_name_the_schema(file):
    first = file.read_text().splitlines()[0]
    name = first.removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / name).resolve() == EXAMPLES / "config.schema.json"
