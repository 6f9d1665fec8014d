"""A chain of stages on made-up directories, with a launcher that only leaves checkpoints behind."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from laver_megatron.config.checks import check
from laver_megatron.config.command_line import Invocation, read_command_line
from laver_megatron.config.fields import ConfigError
from laver_megatron.stages import chain
from laver_megatron.stages.chain import check_stages, differences, read_stages, run_stages
from laver_megatron.start import find_start
from tests.attacks import renew_manifest
from tests.programs import run_here

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
OFFICIAL = [str(EXAMPLES / f"{name}.yaml") for name in ("stage1_align", "stage2_laver", "stage3_instruct")]
DEMO = [str(EXAMPLES / "demo_stages" / Path(file).name) for file in OFFICIAL]
TOOL = ROOT / "tools" / "train_stages.py"
# config.json of the published models, as far as it is read.
QWEN_7B = {
    "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
SIGLIP2 = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
IMAGE_TOKENS = {"<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|image_pad|>": 151655}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current directory, in which the files' relative paths lead to configurations without weights."""
    monkeypatch.chdir(tmp_path)
    tokens = [{"id": number, "content": token} for token, number in IMAGE_TOKENS.items()]
    for model in ("Qwen2.5-7B-Instruct", "runs/demo/model"):
        write(Path(model) / "config.json", QWEN_7B)
        write(Path(model) / "tokenizer.json", {"added_tokens": tokens})
        write(Path(model) / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    for encoder, size in (("siglip2-so400m-patch14-384", 384), ("runs/demo/encoder", 112)):
        write(Path(encoder) / "config.json", {**SIGLIP2, "image_size": size})
        processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size}}
        write(Path(encoder) / "preprocessor_config.json", processor)
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def leave_checkpoint(config, iteration):
    """What a run leaves behind, but for its tensors."""
    directory = Path(config.run.run_dir) / "checkpoints"
    path = directory / f"iter_{iteration:07d}"
    start = find_start(config)
    for part, source in (("hf", start.model_dir), ("encoder", start.encoder_dir)):
        shutil.copytree(source, path / part)
    write(path / "run.json", {**config.flat(), "encoder_feature_layer": -2})  # a run names it
    (path / ".metadata").touch()
    renew_manifest(path)
    (directory / "latest").write_text(str(iteration))


class Launcher:
    """Stands for the launcher. runs: the configurations it was started with, in order; each ran to its end, or to what
    `outcomes` says of its run directory: (exit status, iteration of the checkpoint it leaves)."""

    def __init__(self):
        self.runs, self.outcomes = [], {}

    def __call__(self, arguments):
        config = read_command_line(arguments).config
        check(Invocation(config, dry_run=True))
        self.runs.append(config)
        status, iteration = self.outcomes.pop(config.run.run_dir, (0, config.training.train_iters))
        if iteration:
            leave_checkpoint(config, iteration)
        return status

    @property
    def run_dirs(self):
        return [config.run.run_dir for config in self.runs]


@pytest.fixture
def launcher(monkeypatch):
    launcher = Launcher()
    monkeypatch.setattr(chain, "_launch", launcher)
    return launcher


# --- the configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize("file", OFFICIAL)
def test_every_official_stage_passes_a_dry_run_by_itself(place, file):
    """With nothing but configurations there: no weights, no shards, no checkpoint of the stage before."""
    before = set(place.rglob("*"))
    done = run_here(EXAMPLES / "pretrain_laver.sh", "--config", file, "--dry-run", "8")
    assert done.returncode == 0, done.stderr
    assert "28 layers of width 3584; 8 processes as TP 2 x PP 1 x DP 4; 16 micro-batches" in done.stdout
    assert set(place.rglob("*")) == before


def test_the_official_settings(place):
    align, laver, instruct = (stage.config for stage in read_stages(OFFICIAL))
    for config in (align, laver, instruct):
        assert (
            config.data.global_batch_size,
            config.data.seq_length,
            config.training.bf16,
            config.training.min_lr,
        ) == (128, 2048, True, 0)
        assert (
            config.training.adam_beta1,
            config.training.adam_beta2,
            config.training.weight_decay,
            config.training.clip_grad,
        ) == (0.9, 0.999, 0, 1)
        assert (config.model.attention, config.model.positions) == ("mixed", "mrope")
    assert [(c.training.lr, c.training.train_iters, c.objective.laver) for c in (align, laver, instruct)] == [
        (2e-3, 4360, False), (2e-5, 6250, True), (2e-5, 6250, False)
    ]  # fmt: skip
    assert (align.training.lr_warmup_iters, laver.training.lr_warmup_iters) == (500, 100)
    assert [config.model.freeze for config in (align, laver, instruct)] == [
        ("encoder", "decoder"),
        ("encoder",),
        ("encoder",),
    ]
    of_laver = ("mask_ratio", "ema_momentum", "ema_interval", "mim_weight", "gram_weight")
    assert [laver.flat()[name] for name in of_laver] == [0.05, 0.95, 0.02, 1, 1]
    assert (laver.objective.student_temperature, laver.objective.teacher_temperature) == (0.1, 0.04)


@pytest.mark.parametrize("files", [OFFICIAL, DEMO], ids=["official", "demo"])
def test_headers_say_what_commands_hardware_and_what_to_expect(files):
    for file in files:
        header = Path(file).read_text().split("\n\n")[0]
        for word in ("# What: ", "# Command: ", "# Hardware: ", "# Expect: "):
            assert header.count(word) == 1, (file, word)


def test_a_preset_chooses_the_positions_of_all_stages(place):
    assert {stage.config.model.positions for stage in read_stages(OFFICIAL, ["--preset", "paper"])} == {"2d"}


# --- running -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [OFFICIAL, DEMO], ids=["official", "demo"])
def test_stages_run_in_order_and_once(place, launcher, capfd, files):
    flags = ["--lr", "1e-4", "--data-path", "one", "two"]
    stages = read_stages(files, flags)
    check_stages(stages, dry_run=True)
    assert run_stages(stages) == 0
    assert launcher.runs == [stage.config for stage in stages] and len(launcher.runs) == 3
    assert {(config.training.lr, config.data.data_path) for config in launcher.runs} == {(1e-4, ("one", "two"))}
    assert [config.start.load for config in launcher.runs[1:]] == [
        f"{run}/checkpoints" for run in launcher.run_dirs[:-1]
    ]
    capfd.readouterr()
    assert run_stages(stages) == 0 and len(launcher.runs) == 3
    assert capfd.readouterr().err.count("finished at iteration") == 3
    assert run_stages(read_stages(files, ["--lr", "2e-4", *flags[2:]])) == 0 and len(launcher.runs) == 3
    assert capfd.readouterr().err.count("lr differ now from what it was run with") == 3


def test_an_interrupted_stage_goes_on_and_a_failed_one_ends_the_chain(place, launcher, capfd):
    stages = read_stages(OFFICIAL)
    second = stages[1].config.run.run_dir
    launcher.outcomes[second] = (9, 1250)
    assert run_stages(stages) == 9
    launcher.outcomes[second] = (0, 2500)
    assert run_stages(stages) == chain.EXIT_UNFINISHED
    assert "stage 2 of 3, stage2_laver: stopped at iteration 2500 of 6250" in capfd.readouterr().err
    assert run_stages(stages) == 0
    assert "stage 2 of 3, stage2_laver: resuming at iteration 2500" in capfd.readouterr().err
    assert launcher.run_dirs == [f"runs/7b/{stages[i].name}" for i in (0, 1, 1, 1, 2)]


def test_all_stages_can_be_put_elsewhere(place, launcher):
    """Such as for another encoder."""
    flags = ["--load", "hf:runs/demo/model", "--encoder", "runs/demo/encoder"]
    stages = read_stages(OFFICIAL, flags, runs="runs/other")
    assert run_stages(stages) == 0
    assert launcher.run_dirs == [f"runs/other/{stage.name}" for stage in stages]
    assert [config.start.load for config in launcher.runs] == [
        "hf:runs/demo/model", "runs/other/stage1_align/checkpoints", "runs/other/stage2_laver/checkpoints"
    ]  # fmt: skip
    assert {config.start.encoder for config in launcher.runs} == {"runs/demo/encoder"}


@pytest.mark.processes
def test_the_entry_script_gets_the_arguments(place, monkeypatch):
    """And a stage's exit status is that of the script."""
    Path("script.sh").write_text('echo "$@" >> arguments; exit 7\n')
    monkeypatch.setattr(chain, "LAUNCHER", Path("script.sh"))
    assert run_stages(read_stages(DEMO, ["--seed", "3"])) == 7
    assert Path("arguments").read_text() == f"--config {DEMO[0]} --seed 3\n"


@pytest.mark.processes
def test_a_signal_to_end_reaches_the_entry_script(place):
    Path("script.sh").write_text("trap 'exit 5' TERM\ntouch begun\nwhile true; do sleep 0.05; done\n")
    program = "import pathlib, sys; from laver_megatron.stages import chain; chain.LAUNCHER = pathlib.Path('script.sh')"
    with subprocess.Popen([sys.executable, "-c", f"{program}; sys.exit(chain._launch([]))"]) as process:
        deadline = time.monotonic() + 60
        while not Path("begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 5


# --- the baseline arm ----------------------------------------------------------------------------------


def test_the_baseline_is_the_same_without_laver(place, launcher):
    flags = ["--global-batch-size", "64", "--preset", "paper"]
    stages, paired = read_stages(OFFICIAL, flags, baseline=True), read_stages(OFFICIAL, flags)
    assert run_stages(stages) == 0
    assert launcher.run_dirs == [f"{stage.config.run.run_dir}-baseline" for stage in paired]
    assert [config.start.load for config in launcher.runs[1:]] == [
        f"{run}/checkpoints" for run in launcher.run_dirs[:-1]
    ]
    for mine, theirs in zip(stages, paired, strict=True):
        assert not mine.config.objective.laver and not mine.is_shared
        own = {"laver": False, "run_dir": mine.config.run.run_dir, "load": mine.config.start.load}
        assert mine.config == theirs.config.replace(**own)


def test_what_both_arms_have_alike_runs_once(place, launcher, capfd):
    assert run_stages(read_stages(OFFICIAL)) == 0
    stages = read_stages(OFFICIAL, baseline=True)
    assert [stage.is_shared for stage in stages] == [True, False, False]
    assert run_stages(stages) == 0
    assert (
        "stage1_align: finished at iteration 4360 in runs/7b/stage1_align, the same in both arms"
        in capfd.readouterr().err
    )
    assert launcher.run_dirs[3:] == ["runs/7b/stage2_laver-baseline", "runs/7b/stage3_instruct-baseline"]
    assert [config.start.load for config in launcher.runs[3:]] == [
        "runs/7b/stage1_align/checkpoints", "runs/7b/stage2_laver-baseline/checkpoints"
    ]  # fmt: skip


@pytest.mark.parametrize("flags", [["--seed", "7"], ["--encoder", "runs/demo/encoder"], ["--train-iters", "6000"]])
def test_an_arm_takes_nothing_from_one_that_was_run_otherwise(place, launcher, flags):
    assert run_stages(read_stages(OFFICIAL)) == 0
    assert not any(stage.is_shared for stage in read_stages(OFFICIAL, flags, baseline=True))


def test_an_arm_that_has_begun_goes_on_by_itself(place, launcher):
    launcher.outcomes["runs/7b/stage1_align-baseline"] = (1, 10)
    assert run_stages(read_stages(OFFICIAL, baseline=True)) == 1
    assert run_stages(read_stages(OFFICIAL)) == 0
    assert not any(stage.is_shared for stage in read_stages(OFFICIAL, baseline=True))


# --- bad input -----------------------------------------------------------------------------------------


def problems_of(files, *flags, **options):
    with pytest.raises(ConfigError) as caught:
        check_stages(read_stages(files, flags, **options), dry_run=True)
    return caught.value.problems


@pytest.mark.parametrize("flag", [["--run-dir", "x"], ["--run-dir=x"], ["--no-laver"], ["--finetune"]])
def test_flags_that_belong_to_one_stage(place, flag):
    (problem,) = problems_of(OFFICIAL, *flag)
    assert problem.startswith(f"{flag[0].split('=')[0]} belongs to each stage and cannot be given to all of them")


def edited(place, number, old, new):
    """The official files with a line of one of them changed."""
    path = place / Path(OFFICIAL[number - 1]).name
    text = Path(OFFICIAL[number - 1]).read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return [*OFFICIAL[: number - 1], str(path), *OFFICIAL[number:]]


def test_stages_that_do_not_follow_each_other(place):
    (problem,) = problems_of([OFFICIAL[0], OFFICIAL[2]])
    assert "stage3_instruct.yaml: load is runs/7b/stage2_laver/checkpoints, but the stage before it leaves " in problem
    assert problem.endswith("its last checkpoint in runs/7b/stage1_align/checkpoints; set load to that")
    for rest in ("", "/checkpoint", "/checkpoints/iter_0000099"):
        (problem,) = problems_of(edited(place, 2, "stage1_align/checkpoints", f"stage1_align{rest}"))
        assert f"stage2_laver.yaml: load is runs/7b/stage1_align{rest}, but" in problem
    for rest in ("", "/iter_0001090", "/iter_0004360"):
        check_stages(
            read_stages(edited(place, 2, "stage1_align/checkpoints", f"stage1_align/checkpoints{rest}")), dry_run=True
        )
    (problem,) = problems_of(edited(place, 2, "finetune: true\n", ""))
    assert problem.endswith("stage2_laver.yaml: a stage takes only the weights of the one before; set finetune: true")
    (problem,) = problems_of(edited(place, 2, "run_dir: runs/7b/stage2_laver", "run_dir: runs/7b/stage1_align"))
    assert "runs/7b/stage2_laver" in problem


def test_a_change_between_stages_shows_before_the_first_begins(place):
    (problem,) = problems_of(edited(place, 3, "positions: mrope", "positions: 1d"))
    assert "stage3_instruct.yaml: positions is 1d, but the stage before it (runs/7b/stage2_laver) has mrope" in problem
    assert "or ask for the change with --allow-change positions" in problem
    files = edited(place, 3, "positions: mrope", "positions: 1d\nallow_change: positions")
    check_stages(read_stages(files), dry_run=True)


def test_processes_that_a_later_stage_cannot_use_show_before_the_first_begins(place, monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    problems = problems_of(DEMO)
    assert any("stage2_laver: 2 processes cannot be divided into TP 2 x PP 2" in problem for problem in problems)
    monkeypatch.setenv("NNODES", "2")
    check_stages(read_stages(DEMO), dry_run=True)
    monkeypatch.setenv("NPROC_PER_NODE", "gpu")
    check_stages(read_stages(DEMO), dry_run=True)


def test_a_slip_in_the_last_file_shows_before_the_first_begins(place):
    problems = problems_of(edited(place, 3, "tensor_model_parallel_size: 2", "tensor_model_parallel_size: 3"))
    assert any(problem.startswith("stage3_instruct: tensor_model_parallel_size 3 does not") for problem in problems)
    (problem,) = problems_of(edited(place, 3, "lr: 2e-5", "lr: fast"))
    assert "lr: expected a number" in problem


def test_later_stages_are_judged_by_the_first_ones_model(place):
    """A file need name neither model nor encoder to be checked before there is a checkpoint."""
    files = edited(place, 2, "model: Qwen2.5-7B-Instruct", "")
    check_stages(read_stages(files), dry_run=True)
    files = edited(place, 2, "model: Qwen2.5-7B-Instruct", "seq_length: 65536").copy()
    Path(files[1]).write_text(Path(files[1]).read_text().replace("seq_length: 2048", ""))
    assert any("seq_length 65536 is above" in problem for problem in problems_of(files))


def test_shards_are_looked_for_unless_it_is_a_dry_run(place):
    with pytest.raises(ConfigError) as caught:
        check_stages(read_stages(OFFICIAL))
    assert [problem.split(" does not exist")[0] for problem in caught.value.problems] == [
        f"{stage.name}: data_path: {stage.config.data.data_path[0]}" for stage in read_stages(OFFICIAL)
    ]


def test_what_does_not_change_the_outcome_is_no_difference(place, launcher):
    stages = read_stages(OFFICIAL)
    assert run_stages(stages) == 0
    other = {"tensor_model_parallel_size": 4, "save_interval": 7, "num_workers": 0}
    assert differences(replace(stages[0], config=stages[0].config.replace(**other))) == []
    assert differences(replace(stages[0], config=stages[0].config.replace(lr=1.0, seed=1))) == ["lr", "seed"]


@pytest.mark.parametrize(
    "name, value, shown", [("lr", "fast", "'fast'"), ("seed", [1], "[1]"), ("freeze", 3, "3"), ("seq_length", {}, "{}")]
)
def test_a_checkpoint_that_says_what_no_run_can_have(place, launcher, name, value, shown):
    """Though its checksum fits."""
    stages = read_stages(OFFICIAL)
    assert run_stages(stages) == 0
    file = stages[0].checkpoint / "run.json"
    write(file, {**json.loads(file.read_text()), name: value})
    renew_manifest(file.parent)
    with pytest.raises(ConfigError, match=re.escape(f"{file} says what no run can have: {name} is {shown}; copy")):
        run_stages(stages)


# --- the command ---------------------------------------------------------------------------------------


@pytest.mark.processes
def test_command_line(place):
    command = [sys.executable, TOOL, *OFFICIAL, "--dry-run", "--runs", "runs/x", "--baseline", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["stage1_align", "stage2_laver", "stage3_instruct"]
    assert "--seed 5 --run-dir runs/x/stage2_laver-baseline --load runs/x/stage1_align-baseline/checkpoints" in lines[1]
    done = run_here(TOOL, *OFFICIAL, "--mask-ratoi", "1")
    assert done.returncode == 2 and "unknown flag --mask-ratoi" in done.stderr and "1 problem " in done.stderr
    assert run_here(TOOL, "--baseline").returncode == 2 and "--baseline" in run_here(TOOL, "--help").stdout
