"""`laver`: its table, its help pages, its exit statuses, and the layers of the package behind it."""

import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from laver_megatron.__main__ import COMMANDS, main
from laver_megatron.config.fields import ConfigError
from laver_megatron.program import EXAMPLES, program, program_parser

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if not path.stem.startswith("bench"))
PROGRAMS = (
    "program",
    "launcher",
    "status_command",
    "checkpoint_command",
    "shards",
    "convert",
    "planning",
    "studies",
    "stages",
    "demo",
    "inspection",
    "__main__",
)
MOST_LINES_OF_THE_CORE = 20_500


def ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


# --- the table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_page_says_what_it_does_and_gives_two_examples(name, capsys):
    assert not ended([*name.split(), "--help"])
    page = capsys.readouterr().out
    usage = "train" if name == "dry-run" else name  # which are the same flags
    assert page.startswith(f"usage: laver {usage} ")
    examples = page.partition("\nexamples:\n")[2].splitlines()
    assert len(examples) >= 2 and all(re.match(rf"  (srun .*)?laver {usage}\b", line) for line in examples)


def test_a_default_of_zero_is_shown_and_a_switch_has_none():
    parser = program_parser("inspect", "Looks.", ["--alpha 1"])
    parser.add_argument("--alpha", type=float, default=0.0, help="how much")
    parser.add_argument("--json", action="store_true", help="print JSON")
    page = parser.format_help()
    assert "how much (default: 0.0)" in page and page.count("(default") == 1


def test_the_front_page_names_every_command(capsys):
    for words in ([], ["--help"]):
        main(words)
        page = capsys.readouterr().out
        assert all(f"  {name} " in page and command.summary in page for name, command in COMMANDS.items())
    main(["shards", "--help"])
    page = capsys.readouterr().out
    assert "shards make" in page and "sweep" not in page


@pytest.mark.parametrize(
    "words, remedy",
    [
        (["trian"], "there is no command trian; did you mean train?"),
        (["shards", "mak"], "there is no command shards mak; did you mean shards make?"),
        (["dryrun", "8"], "there is no command dryrun; did you mean dry-run?"),
        (["xyzzy"], "there is no command xyzzy; choose from train, dry-run"),
    ],
)
def test_unknown_commands_get_the_nearest_name(words, remedy, capsys):
    assert ended(words) == 2
    assert remedy in capsys.readouterr().err


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_is_a_command(tool):
    """Imported as by a process that Megatron's checkpoint writer spawns, it starts nothing."""
    namespace = {"__name__": "__mp_main__", "__file__": str(ROOT / "tools" / f"{tool}.py")}
    path = list(sys.path)
    try:
        exec((ROOT / "tools" / f"{tool}.py").read_text(), namespace)
    finally:
        sys.path[:] = path
    mains = {getattr(import_module(f"laver_megatron.{each.module}"), each.function) for each in COMMANDS.values()}
    assert mains & {value for value in namespace.values() if callable(value)}


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("laver_megatron.__main__.import_module", missing)
    assert ended(["train"]) == 1
    assert capsys.readouterr().err == "error: this needs torch, which is not installed: pip install laver_megatron\n"


def test_examples_are_copied_to_a_new_directory(tmp_path, capsys):
    main(["examples", str(tmp_path / "mine")])
    copied = {path.relative_to(tmp_path / "mine") for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    there = {path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert copied == there and Path("demo.yaml") in copied
    assert os.access(tmp_path / "mine" / "pretrain_laver.sh", os.X_OK)
    assert ended(["examples", str(tmp_path / "mine")]) == 2
    assert "is there already" in capsys.readouterr().err


# --- exit statuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, status, said",
    [
        (ConfigError(["lr is -1", "no data"]), 2, "2 problems in the configuration:\n  - lr is -1\n  - no data\n"),
        (ValueError("no samples in a.tar"), 2, "error: no samples in a.tar\n"),
        (FileNotFoundError(2, "No such file or directory", "runs/x"), 2, "error: runs/x: No such file or directory\n"),
        (FileExistsError(17, "File exists", "out"), 2, "error: out: File exists\n"),
        (OSError(28, "No space left on device", "a.tar"), 1, "error: a.tar: No space left on device\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("interrupted; go on with --resume"), 130, "interrupted; go on with --resume\n"),
    ],
)
def test_one_rule_for_exit_statuses(error, status, said, capsys):
    @program
    def fail(argv=None):
        raise error

    with pytest.raises(SystemExit) as end:
        fail([])
    assert end.value.code == status and capsys.readouterr().err == said


def test_what_is_our_mistake_keeps_its_traceback():
    @program
    def fail(argv=None):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        fail([])


@pytest.mark.processes
def test_sigterm_is_ctrl_c_here_and_ends_what_was_forked():
    """In a process of its own: what the tests fork would go on with the tests."""
    program = (
        "import os, signal, time\n"
        "from laver_megatron.program import program\n"
        "@program\n"
        "def main(argv=None):\n"
        "    reading, writing = os.pipe()\n"
        "    child = os.fork()\n"
        "    if child == 0: os.write(writing, b'.')\n"  # what comes before Python has forked is dropped
        "    while child == 0: time.sleep(0.01)\n"
        "    os.read(reading, 1)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "main([])\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, f"{128 + signal.SIGTERM}\n", "interrupted\n")


# --- layers ----------------------------------------------------------------------------------------------


def run_python(program: str) -> list[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.processes
def test_help_and_plan_need_no_torch_and_are_quick():
    program = (
        "import contextlib, io, sys, time\n"
        "from laver_megatron.__main__ import main\n"
        "def run(*words):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(words)\n"
        "run('--help'); run('plan', '--help')\n"
        "print(time.process_time())\n"
        "run('plan', '--model', '7b', '--gpus', '16', '--gpu', 'a100-80gb')\n"
        # With a file: what stands in for modules of Megatron-Core has none.
        "found = {name.split('.')[0] for name, module in sys.modules.items() if getattr(module, '__file__', None)}\n"
        "print(*found - set(sys.stdlib_module_names))\n"
    )
    seconds, modules = run_python(program)
    assert float(seconds) < 1
    assert not {"torch", "megatron", "transformers", "numpy", "scipy", "matplotlib", "PIL"} & set(modules.split())


@pytest.fixture(scope="module")
def imported():
    """The modules that training imports: their files by their names, or None."""
    program = (
        "import sys, laver_megatron.train\n"
        "for name, module in sorted(sys.modules.items()): print(name, getattr(module, '__file__', None))\n"
    )
    return dict(line.split(" ", 1) for line in run_python(program))


@pytest.fixture(scope="module")
def core(imported):
    """Those of the package."""
    return {name: file for name, file in imported.items() if name.split(".")[0] == "laver_megatron"}


@pytest.mark.processes
def test_training_loads_no_program(core):
    rooms = {name.split(".")[1] for name in core if "." in name}
    assert "trainer" in rooms and not rooms & set(PROGRAMS)


SLOW_TO_IMPORT = ("transformers", "torch._dynamo", "torch._inductor", "matplotlib", "scipy", "pandas", "webdataset")


@pytest.mark.processes
def test_training_imports_nothing_slow_before_it_needs_it(imported):
    """The trainer starts on every rank; each of these takes a second of it, or two."""
    assert "torch" in imported and not imported.keys() & set(SLOW_TO_IMPORT)


@pytest.mark.processes
def test_help_pages_import_nothing_slow():
    code = (
        "import contextlib, io, sys\n"
        "from laver_megatron.__main__ import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as page:\n"
        "        main([*name.split(), '--help'])\n"
        "    assert page.getvalue().startswith('usage: laver'), name\n"
        f"print(*(name for name in {('torch', 'megatron', *SLOW_TO_IMPORT)} if name in sys.modules), sep=',')"
    )
    assert run_python(code) == ["scipy"]  # of `laver fit`, in 0.4 s


@pytest.mark.processes
def test_training_loads_no_more_lines_than_the_bound(core):
    num_lines = sum(len(Path(file).read_text().splitlines()) for file in core.values())
    assert num_lines < MOST_LINES_OF_THE_CORE, f"{len(core)} modules, {num_lines:,} lines"
