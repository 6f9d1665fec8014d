"""The dry run of a command line: all checks that need neither weights nor shards, then every rank without memory."""

from __future__ import annotations

from pathlib import Path

from laver_megatron.config.checks import check, describe_run
from laver_megatron.config.command_line import Invocation, exit_on_config_error, is_rank_zero
from laver_megatron.config.fields import ConfigError
from laver_megatron.start import find_start


def show_dry_run(invocation: Invocation) -> None:
    """Prints on rank 0 what every rank will hold; ends the process with exit code 2 if the run cannot be."""
    assert invocation.dry_run
    config, world_size = invocation.config, invocation.world_size()
    with exit_on_config_error():
        shape = check(invocation)  # on another machine, perhaps, than the one that will train
        if not is_rank_zero():
            return
        from laver_megatron.encoders import encoder_tensor_sizes, read_encoder
        from laver_megatron.planning.disk import checkpoint_bytes, room_free, room_needed
        from laver_megatron.planning.dry_run import (  # Megatron-Core: mistakes need not wait for it
            dry_run,
            dry_run_report,
        )

        encoder_dir = find_start(config).encoder_dir
        assert encoder_dir is not None, "a run without an encoder has been refused"
        try:
            found = dry_run(config, shape, encoder_dir, world_size)
        except ValueError as error:
            raise ConfigError([f"the model cannot be built: {error}"]) from error
        if found.problems:
            raise ConfigError(found.problems)
    print(dry_run_report(found))
    size = checkpoint_bytes(config, shape, read_encoder(encoder_dir), encoder_tensor_sizes(encoder_dir))
    print(f"{room_needed(config, size)}; {room_free(Path(config.run.run_dir))}")
    print(f"dry run, nothing wrong: {describe_run(config, shape, world_size)}")
