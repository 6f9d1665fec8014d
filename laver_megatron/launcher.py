"""`laver train`, and examples/pretrain_laver.sh: checks a run once, then starts its processes by torchrun.

Under torchrun the same program is one rank of the run. Without --config it is the demo's, whose model and data are made
if need be. How many processes on how many nodes there are is said by NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR
and MASTER_PORT, or else by SLURM.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from laver_megatron.config.checks import check, check_run
from laver_megatron.config.command_line import (
    Invocation,
    exit_on_config_error,
    from_command_line,
    is_rank_zero,
    load_config,
    read_command_line,
)
from laver_megatron.config.fields import Config, ConfigError
from laver_megatron.config.layout_checks import world_problems
from laver_megatron.program import EXAMPLES, program
from laver_megatron.resilience.signals import STARTED, heed_signals

if TYPE_CHECKING:
    from laver_megatron.resilience.agent import StopRequest
    from laver_megatron.resilience.endings import Ending
    from laver_megatron.resilience.rendezvous import Alone, Plan

LAUNCHER = EXAMPLES / "pretrain_laver.sh"
DEMO_CONFIG = EXAMPLES / "demo.yaml"
DEMO_DIR = Path("runs/demo")  # as in demo.yaml: below the current directory
DEMO_PARTS = ("model", "encoder", "shards")
DEMO_TIMEOUT_SECONDS = 600
# For agents to find each other when nodes start again: their supervisors have met already.
_MEETING_SECONDS = 300
_ASKS_FOR_HELP = ("--help", "-h", "--print-schema")
_ASKS_ONLY = (*_ASKS_FOR_HELP, "--print-config", "--dry-run")
_LAYOUT_FLAGS = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size")


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Trains, as one rank or by starting all of this node's; or answers what --help and the like ask for."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_demo = not _names(arguments, "--config", *_ASKS_FOR_HELP)
    if _names(arguments, *_ASKS_ONLY):
        _answer(demo_arguments(arguments) if is_demo else arguments)
    elif "RANK" not in os.environ:
        _start(arguments, is_demo)
    else:
        if is_demo:
            arguments = demo_arguments(arguments)
            make_or_await_demo(DEMO_DIR)
        _train(check_run(from_command_line(arguments)))


@program
def dry_run_main(argv: Sequence[str] | None = None) -> None:
    """`laver dry-run [PROCESSES] --config FILE ...` is `laver train --dry-run [PROCESSES] --config FILE ...`."""
    words = list(sys.argv[1:] if argv is None else argv)
    num_flags = 1 if words and not words[0].startswith("-") else 0
    main([*words[num_flags:], "--dry-run", *words[:num_flags]])


def _answer(arguments: Sequence[str]) -> None:
    """--help, --print-schema and --print-config end the process while they are read."""
    invocation = from_command_line(arguments)
    from laver_megatron.planning.dry_run_command import show_dry_run

    show_dry_run(invocation)


def _train(config: Config) -> None:
    heed_signals(config.run.run_dir)
    from laver_megatron import train  # only now: help and mistakes need not wait for Megatron-Core
    from laver_megatron.resilience.nccl import set_nccl_variables

    set_nccl_variables(Path(config.run.run_dir))
    train.run(config)


# --- starting the processes of a node --------------------------------------------------------------------


def _start(arguments: list[str], is_demo: bool) -> None:
    """Checks the run and starts this node's processes, or trains here if there is only one in all."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it; the ranks inherit it
    import torch

    per_node, num_nodes = count_processes(arguments)
    world_size = per_node * num_nodes
    if is_demo:
        arguments = demo_arguments(arguments, {"WORLD_SIZE": str(world_size)})
    config = from_command_line(arguments).config
    if is_demo:
        make_or_await_demo(DEMO_DIR)
    with exit_on_config_error():
        check(Invocation(config, dry_run_world_size=world_size), on_cuda=torch.cuda.is_available())
        if config.reliability.elastic:
            check_elastic(config, per_node, num_nodes)
    os.environ.setdefault(STARTED, str(time.time()))
    if world_size == 1 and not config.reliability.restarts:
        _train(config)
    else:
        _run_ranks(["--nproc-per-node", str(per_node), str(LAUNCHER), *arguments], per_node, num_nodes, config)


def _run_ranks(words: Sequence[str], per_node: int, num_nodes: int, config: Config) -> None:
    """Runs this node's ranks under torchrun, which gets `words`, as often as --restarts says."""
    from laver_megatron.resilience.agent import run_agent  # only now: help needs no package but PyYAML
    from laver_megatron.resilience.run_lock import refuse_second
    from laver_megatron.resilience.supervisor import supervise

    node = int(_node_rank(os.environ))
    if num_nodes == 1:  # else rank 0 finds out, and all nodes are told
        refuse_second(Path(config.run.run_dir))

    def run_once(request: StopRequest, plan: Plan) -> Ending:
        rank = plan.nodes.index(node)
        flags = meeting(len(plan.nodes), {**os.environ, "NODE_RANK": str(rank)}, attempt=plan.attempt)
        return run_agent([*flags, *words], per_node, request)

    supervise(run_once, config, _rendezvous(node, num_nodes, per_node, config))


def _rendezvous(node: int, num_nodes: int, per_node: int, config: Config) -> Alone:
    from laver_megatron.resilience.rendezvous import Alone, Guest
    from laver_megatron.resilience.rendezvous_host import Host

    settings = config.reliability
    if num_nodes == 1 or not settings.restarts:
        return Alone(node, num_nodes)
    address, port = _master(os.environ)
    if node != 0:
        return Guest(node, num_nodes, (address, port - 1), 60 * settings.node_timeout_minutes)

    def fits(count: int) -> bool:
        return count == num_nodes or (settings.elastic and not list(world_problems(config, count * per_node)))

    return Host(num_nodes, port - 1, 60 * settings.node_timeout_minutes, fits)


def check_elastic(config: Config, per_node: int, num_nodes: int) -> None:
    """Raises ConfigError where --elastic could never go on with fewer nodes."""
    problems = (
        [] if config.reliability.restarts else ["elastic goes on by a restart, but restarts is 0: set --restarts"]
    )
    of_fewer = [list(world_problems(config, count * per_node)) for count in range(1, num_nodes)]
    if num_nodes == 1:
        problems.append("elastic goes on without lost nodes, but there is one node (NNODES); drop --elastic")
    elif all(of_fewer):
        problems.append(f"elastic: no fewer than {num_nodes} nodes will do; with {num_nodes - 1}: {of_fewer[-1][0]}")
    if problems:
        raise ConfigError(problems)


def count_processes(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(processes on each node, nodes), by what torchrun's variables or SLURM's say; else one process for each GPU or,
    on machines without any, as many as the smallest layout needs, TP x PP. A configuration with mistakes ends the
    process with exit code 2."""
    import torch
    from torch.distributed.run import determine_local_world_size

    num_nodes = int(environ.get("NNODES") or environ.get("SLURM_NNODES") or 1)
    if given := environ.get("NPROC_PER_NODE"):
        return determine_local_world_size(given), num_nodes  # a number, `gpu`, `cpu` or `auto`
    if torch.cuda.device_count() > 0:
        return torch.cuda.device_count(), num_nodes
    if not _names(arguments, "--config"):
        arguments = ["--config", str(DEMO_CONFIG), *arguments]
    with exit_on_config_error():
        parallel = load_config(arguments).parallel
    smallest = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return max(1, smallest // num_nodes), num_nodes


def meeting(num_nodes: int, environ: Mapping[str, str] = os.environ, *, attempt: int = 0) -> tuple[str, ...]:
    """torchrun's flags by which the nodes find each other. attempt: how often they were started before; every one has a
    port of its own, so that none meets what another node has left of the last."""
    if num_nodes == 1 and not (environ.get("MASTER_ADDR") or environ.get("MASTER_PORT")):
        return ("--standalone",)
    address, port = _master(environ)
    flags = ("--nnodes", str(num_nodes), "--node-rank", _node_rank(environ), "--master-addr", address)
    patience = ("--rdzv-conf", f"timeout={_MEETING_SECONDS}") if attempt else ()
    return *flags, "--master-port", str(port + attempt), *patience


def _master(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of node 0."""
    host = environ.get("MASTER_ADDR") or _first_host(environ.get("SLURM_JOB_NODELIST")) or "localhost"
    return host, int(environ.get("MASTER_PORT") or "29500")


def _node_rank(environ: Mapping[str, str]) -> str:
    return environ.get("NODE_RANK") or environ.get("SLURM_NODEID") or "0"


def _first_host(nodes: str | None) -> str | None:
    """Of SLURM's list, such as node[07-09]."""
    if not nodes:
        return None
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return hosts.stdout.split()[0]


# --- the demo --------------------------------------------------------------------------------------------


def demo_arguments(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """The arguments with the demo's configuration in front, and with a layout of one process where the number
    of processes does not fit the demo's."""
    with_demo = ["--config", str(DEMO_CONFIG), *arguments]
    _say(f"no --config: running the demo, {DEMO_CONFIG}, in {DEMO_DIR} of the current directory")
    if _names(arguments, "--print-config", *_LAYOUT_FLAGS):
        return with_demo
    with exit_on_config_error():
        invocation = read_command_line(with_demo)
    parallel = invocation.config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    world_size = invocation.world_size(environ)
    if world_size % (tp * pp):
        _say(f"{world_size} process(es) do not make the demo's TP {tp} x PP {pp}: using TP 1 x PP 1")
        with_demo += ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
        with_demo += ["--no-sequence-parallel"]
    return with_demo


def make_or_await_demo(directory: Path) -> None:
    """Makes the demo's model, encoder and shards on the first process of the machine; the others wait."""
    if _demo_is_there(directory):
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        from laver_megatron.demo.make import make_demo

        make_demo(directory)
        return
    deadline = time.monotonic() + DEMO_TIMEOUT_SECONDS
    while not _demo_is_there(directory):
        if time.monotonic() > deadline:
            raise SystemExit(f"{directory}: the demo's files were not made in {DEMO_TIMEOUT_SECONDS} seconds")
        time.sleep(0.2)


def _demo_is_there(directory: Path) -> bool:
    # Each part is renamed into place when it is complete.
    return all((directory / part).is_dir() for part in DEMO_PARTS)


def _names(arguments: Sequence[str], *flags: str) -> bool:
    return any(argument.split("=", 1)[0] in flags for argument in arguments)


def _say(message: str) -> None:
    if is_rank_zero():
        print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
