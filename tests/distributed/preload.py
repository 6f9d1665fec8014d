"""What the worker processes share: imported once, by the server that they are forked from."""

import laver_megatron.train  # noqa: F401
import tests.distributed.build
import tests.parity  # noqa: F401
