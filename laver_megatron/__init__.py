"""LaVer on Megatron-Core: multimodal language models that also learn from their own visual tokens."""

import warnings

from laver_megatron.runtime.engine import prepare_import
from laver_megatron.runtime.lazy_compile import defer_compilation

__version__ = "0.1.0"

# What Megatron-Core and torch say at every start about things that are as they should be here. Some of it is
# said while Megatron-Core is imported, so the filters stand where they come first.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "absl.logging is not installed",
    ".*CUDA_DEVICE_MAX_CONNECTIONS",
    "The .grad attribute of a Tensor that is not a leaf",
    "full scope is deprecated",
    "`?torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor|_reduce_scatter_base|_all_gather_base)`? ",
    "`?load_state_dict`? is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)

prepare_import()
defer_compilation()
