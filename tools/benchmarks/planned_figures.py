"""Prints the planner's figures in the heads of examples/scaling/*.yaml and in the tables of docs/planning.md.

python tools/benchmarks/planned_figures.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from laver_megatron.planning.hardware import GIB
from laver_megatron.planning.plan import Plan, laver_costs, layout_name, split_name
from laver_megatron.planning.plan_command import build_parser, make_job, pinned_fields
from laver_megatron.planning.plan_report import best_of_each, split_cell
from laver_megatron.planning.search import search

# The ladder's sizes, and the number of GPUs that each file's own layout is for.
LADDER = {"0.5b": 8, "1.5b": 8, "3b": 8, "7b": 8, "14b": 16, "32b": 32, "72b": 64, "110b": 128}
_LADDER_FLAGS = "--gpu h100-80gb --seq-length 2048 --global-batch-size 128 --visual-share 0.72 --recompute none"
_COMPARED_GPUS = (8, 64, 256, 1024)
# As in docs/planning.md; what stands there above each table.
PAPER_FLAGS = "--model 7b --gpus 16 --gpu a100-80gb --seq-length 2048 --global-batch-size 128 --visual-share 0.36"
BIGGER = {"0.5b": 8, "1.5b": 8, "3b": 16, "7b": 32, "14b": 64, "32b": 128, "72b": 256, "110b": 512}
_BIGGER_FLAGS = "--gpu h100-80gb --seq-length 4096 --global-batch-size 512 --visual-share 0.6"


def fitting_plans(flags: str) -> tuple[Plan, ...]:
    """What tools/plan.py finds with these flags, the fastest first."""
    arguments = build_parser().parse_args(flags.split())
    return search(make_job(arguments), pinned_fields(arguments)).fitting


def ladder_plan(size: str) -> Plan:
    """The layout of a size's file."""
    return fitting_plans(f"--model {size} --gpus {LADDER[size]} {_LADDER_FLAGS}")[0]


def ladder_head(size: str) -> list[str]:
    """The lines on hardware of a size's file."""
    plan, num_gpus = ladder_plan(size), LADDER[size]
    words = {8: "eight", 16: "sixteen"}.get(num_gpus, str(num_gpus))
    nodes = f", {num_gpus // 8} nodes" if num_gpus > 8 else ""
    rows = [_ladder_row(size, number) for number in _COMPARED_GPUS]
    uneven = any("/" in row for row in rows)
    return [
        f"# Hardware: {words} GPUs of 80 GB{nodes}, as {_layout(plan)}; {_gib(plan.fullest.memory_bytes)} GiB on the "
        "fullest,",
        f"#           {_gib(plan.fullest.state.total)} GiB of them weights, gradients, optimizer and teacher. "
        "Computed, not run.",
        "#           tools/plan.py's choice of layout for H100s of 80 GB, packs with two images, nothing recomputed"
        + ("" if uneven else ":"),
        *(["#           (chunks a/b: none, but a layers on the first stage and b on the last):"] if uneven else []),
        "#            GPUs  TP  PP  chunks   DP   GiB  s/iteration  tokens/s/GPU",
        *rows,
    ]


def _ladder_row(size: str, num_gpus: int) -> str:
    plans = fitting_plans(f"--model {size} --gpus {num_gpus} {_LADDER_FLAGS}")
    start = f"#           {num_gpus:>5,}"
    if not plans:
        return f"{start}  does not fit"
    plan = plans[0]
    config = plan.config
    return (
        f"{start}{config.parallel.tensor_model_parallel_size:>4}{config.parallel.pipeline_model_parallel_size:>4}"
        f"{split_cell(config):>8}{plan.data_parallel_size:>5}{_gib(plan.fullest.memory_bytes):>6}"
        f"{f'{plan.seconds:.3g}':>13}{plan.tokens_per_second_per_gpu:>14,.0f}"
    )


def _layout(plan: Plan) -> str:
    """TP and PP only where there are any."""
    config = plan.config
    sizes = {"TP": config.parallel.tensor_model_parallel_size, "PP": config.parallel.pipeline_model_parallel_size}
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1] + [f"DP {plan.data_parallel_size}"]
    return " x ".join(parts) + split_name(config)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.0f}"


def _markdown(*rows: Sequence[str]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def paper_tables() -> list[str]:
    """The paper's set-up: the fastest layouts, and what LaVer costs in the first."""
    plans = best_of_each(fitting_plans(PAPER_FLAGS))[:3]
    layouts = _markdown(
        ["layout", "GiB", "s/iteration", "tokens/s/GPU", "GPU hours of 6,250 iterations"],
        *(
            [
                layout_name(plan.config, plan.job.num_gpus),
                f"{plan.fullest.memory_bytes / GIB:.1f}",
                f"{plan.seconds:.2f}",
                f"{plan.tokens_per_second_per_gpu:,.0f}",
                f"{plan.gpu_hours:,.0f}",
            ]
            for plan in plans
        ),
    )
    costs = laver_costs(plans[0])
    assert costs is not None
    of_laver = _markdown(
        ["what", "GiB on a rank", f"seconds of {plans[0].seconds:.2f}"],
        [
            "teacher: weights and accumulators; its pass",
            f"{costs.teacher_bytes / GIB:.2f}",
            f"{costs.teacher_seconds:.2f}",
        ],
        [
            "second stream: its activations; its pass",
            f"{costs.stream_bytes / GIB:.2f}",
            f"{costs.stream_seconds:.2f}",
        ],
        [
            "vision head: weights, gradients, optimizer; head and Gram matrices",
            f"{costs.head_bytes / GIB:.2f}",
            f"{costs.head_seconds:.3f}",
        ],
    )
    return [*layouts, *of_laver, f"{costs.ratio:.2f} times the time without it."]


def bigger_models_table(sizes: Sequence[str] = tuple(BIGGER)) -> list[str]:
    """The fastest layout of every size. sizes: of BIGGER."""
    return _markdown(
        ["model", "GPUs", "layout", "GiB", "s/iteration", "tokens/s/GPU", "MFU, exact area", "LaVer / without"],
        *(_bigger_row(size) for size in sizes),
    )


def _bigger_row(size: str) -> list[str]:
    plan = fitting_plans(f"--model {size} --gpus {BIGGER[size]} {_BIGGER_FLAGS}")[0]
    costs = laver_costs(plan)
    assert costs is not None
    return [
        size.upper(),
        str(BIGGER[size]),
        layout_name(plan.config, plan.job.num_gpus),
        f"{plan.fullest.memory_bytes / GIB:.1f}",
        f"{plan.seconds:.2f}",
        f"{plan.tokens_per_second_per_gpu:,.0f}",
        f"{plan.model_flops_utilisation:.1%}",
        f"{costs.ratio:.2f}",
    ]


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()  # --help
    for size in LADDER:
        print(f"examples/scaling/{size}.yaml", *ladder_head(size), sep="\n", end="\n\n")
    print("docs/planning.md", *paper_tables(), *bigger_models_table(), sep="\n")


if __name__ == "__main__":
    main()
