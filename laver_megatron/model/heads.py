"""Small modules around the decoder: the connector, the vision head, and how both are initialised.

Letters: T tokens, H the decoder's width, K the vision head's output width, L B sequence and packs.
"""

import copy
import hashlib

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup


def seeded_normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """fp32 N(0, std) that depends on the parameter's name and the run's seed alone, so that every layout of
    the model starts from the same values."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


class Connector(nn.Module):
    """Two linear layers with GELU from the encoder's features to the decoder's width: `[T, E] -> [T, H]`.
    Replicated over the tensor-parallel ranks."""

    def __init__(self, feature_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(feature_size, hidden_size, dtype=dtype)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, dtype=dtype)

    def forward(self, features_TE: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(features_TE)))

    @torch.no_grad()
    def initialise(self, prefix: str, seed: int) -> None:
        """N(0, 1/sqrt(fan in)) weights, zero biases."""
        for name, layer in (("linear_1", self.linear_1), ("linear_2", self.linear_2)):
            std = layer.in_features**-0.5
            layer.weight.copy_(seeded_normal(f"{prefix}{name}.weight", tuple(layer.weight.shape), std, seed))
            layer.bias.zero_()


class VisionHead(nn.Module):
    """Three linear layers from hidden states to visual logits, H -> M -> M -> K, GELU between, the last
    without bias (the paper's 3-layer MLP V_psi). `[L, B, H] -> [L, B, K / TP]`: the middle width and the
    logits are split over the tensor-parallel ranks.

    The input must be the whole sequence on every rank; the caller sums its gradient over the ranks.
    """

    def __init__(
        self, config: TransformerConfig, middle_size: int, output_size: int, tp_group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        config = copy.copy(config)
        config.sequence_parallel = False
        common = {"config": config, "init_method": config.init_method, "skip_bias_add": False, "tp_group": tp_group}
        self.linear_1 = ColumnParallelLinear(
            config.hidden_size,
            middle_size,
            bias=True,
            gather_output=False,
            disable_grad_reduce=True,
            **common,
        )
        self.linear_2 = RowParallelLinear(middle_size, middle_size, bias=True, input_is_parallel=True, **common)
        self.linear_3 = ColumnParallelLinear(middle_size, output_size, bias=False, gather_output=False, **common)

    def forward(self, hidden_LBH: Tensor) -> Tensor:
        middle = nn.functional.gelu(self.linear_1(hidden_LBH)[0])
        middle = nn.functional.gelu(self.linear_2(middle)[0])
        return self.linear_3(middle)[0]

    @torch.no_grad()
    def initialise(self, prefix: str, seed: int) -> None:
        """N(0, sqrt(2 / fan in)) weights as the official code starts them, zero biases; each rank takes its
        part of the whole matrix."""
        for name, layer, axis in (
            ("linear_1", self.linear_1, 0),
            ("linear_2", self.linear_2, 1),
            ("linear_3", self.linear_3, 0),
        ):
            std = (2.0 / layer.input_size) ** 0.5
            full = seeded_normal(f"{prefix}{name}.weight", (layer.output_size, layer.input_size), std, seed)
            group = layer.tp_group
            layer.weight.copy_(full.chunk(group.size(), dim=axis)[group.rank()])
            if layer.bias is not None:
                layer.bias.zero_()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = {}
        for name, layer in self.named_children():
            state.update(layer.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))  # type: ignore[operator]
        return state
