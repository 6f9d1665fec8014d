"""The launcher with a fault put around the trainer from outside: `torchrun faulty_run.py FAULT RANK ARGUMENTS...`.

From the third iteration on the rank sleeps where it reads its data, loops in Python, sleeps inside a C call that holds
the GIL, or is slow; or its thread sleeps while it writes the checkpoint of the fourth.
"""

import ctypes
import os
import sys
import time

FROM_ITERATION = 3
LONG = 300


def stall(file):
    if file.path.parent.name.startswith(".iter_0000004"):  # that of the second may be written as late
        time.sleep(LONG)


def spin(*_):
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        pass


FAULTS = {
    "none": None,
    "data": ("BatchSource", "at", lambda *_: time.sleep(LONG)),
    "loop": ("train", "run_schedule", spin),
    "gil": ("train", "run_schedule", lambda *_: ctypes.PyDLL(None).sleep(LONG)),
    "slow": ("train", "run_schedule", lambda *_: time.sleep(0.5)),
    "save": ("_HashedFile", "sync", stall),
}


def install(fault):
    from laver_megatron import train
    from laver_megatron.checkpoint.writer import _HashedFile
    from laver_megatron.data.batch.batches import BatchSource
    from laver_megatron.resilience import phases

    kind, name, do = fault
    owner = {"train": train, "BatchSource": BatchSource, "_HashedFile": _HashedFile}[kind]
    original = getattr(owner, name)

    def faulty(*arguments, **others):
        if phases.now().iteration >= FROM_ITERATION:
            do(*arguments)
        return original(*arguments, **others)

    setattr(owner, name, faulty)


def main():
    fault, rank = FAULTS[sys.argv[1]], sys.argv[2]
    del sys.argv[1:3]
    from laver_megatron import launcher

    if fault is not None and os.environ["RANK"] == rank:
        install(fault)
    launcher.main()


if __name__ == "__main__":
    main()
