"""Jobs of the planner by its own flags."""

from laver_megatron.planning.plan import Job
from laver_megatron.planning.plan_command import build_parser, make_job


def job_of(*flags: str) -> Job:
    return make_job(build_parser().parse_args(flags))
