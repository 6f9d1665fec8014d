"""The pipeline-stage module: the student and, beside it, the teacher, on one tensor that flows through the pipeline.

Letters: B packs, S language tokens, V visual slots, L a sequence, H width, E feature width, W vocabulary
columns and K vision-head columns on this rank, R rows with a label, T tokens of all images, t those of this rank's.

A micro-batch is `[language S | masked visual V | unmasked visual V]` along the sequence. The student's
layers run the first S + V (spans keep the two apart), the teacher's the last V without gradients. What goes
from one stage to the next is that one tensor, so Megatron-Core's schedules work unchanged and the teacher
adds no bubble. Under sequence parallelism the student's and the teacher's part are each scattered as one
sequence, so a rank holds `[student part | teacher part]` and gathering restores the order.

    stage 0    encoder, connector, embedding, [MASK]  ->  layers
    ...                                                   layers (student and teacher)
    last                                                  layers  ->  LM head, vision head, teacher's vision head
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from laver_megatron.config.fields import Config
from laver_megatron.data.batch.division import divide_images
from laver_megatron.encoders.modules import ImageEncoder
from laver_megatron.flops.encoder import BY_TOKENS, ImageCost
from laver_megatron.hf.shape import ModelShape
from laver_megatron.model.heads import Connector, VisionHead, seeded_normal
from laver_megatron.model.image_division import gather_visual_tokens, mark_partial
from laver_megatron.model.precision import teacher_config
from laver_megatron.model.qwen import build_decoder, transformer_config
from laver_megatron.model.streams import MicroBatch, StreamSettings
from laver_megatron.model.targets import reconstruction_target


@dataclass(frozen=True)
class StageOutput:
    """What the last stage hands to the losses. Logits are split over the tensor-parallel ranks: those of the language
    stream's rows that have a label, and those of all visual tokens, None without LaVer. target_TK: what the student's
    are to be, split like them; None where the teacher's are the target."""

    language_logits_RW: Tensor
    student_logits_TK: Tensor | None
    teacher_logits_TK: Tensor | None
    target_TK: Tensor | None = None


class Teacher(nn.Module):
    """The teacher's share of a stage: decoder layers, and final norm and vision head on the last stage. It
    has no gradients; `laver_megatron.model.teacher` updates its weights from the student's."""

    def __init__(self, decoder: nn.Module, vision_head: nn.Module | None) -> None:
        super().__init__()
        self.decoder = decoder
        if vision_head is not None:
            self.vision_head = vision_head
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode: activation recompute would be pure waste here."""
        return super().train(False)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The teacher's tensors as Megatron-Core shards them; keys are the student's under `prefix`."""
        state = {}
        for name, module in self.named_children():
            state.update(module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))  # type: ignore[operator]
        return state


class LaverStage(LanguageModule):
    """One pipeline stage (or virtual stage) of LaVer. Built with NaN weights; `load` or a checkpoint fills them.

    encoder: on the first stage, the image encoder. Without one the model is text only: it has no connector
    and refuses micro-batches with images, and there is no LaVer in it. image_cost: by which images are divided over
    the tensor-parallel ranks; their pixels must come divided so.
    """

    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        encoder: ImageEncoder | None,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
        megatron_config: TransformerConfig | None = None,
        image_cost: ImageCost = BY_TOKENS,
    ) -> None:
        objective = config.objective
        megatron_config = megatron_config or transformer_config(config, shape)
        super().__init__(config=megatron_config)
        self.run_config, self.shape, self.image_cost = config, shape, image_cost
        self.streams = StreamSettings.of(config, shape)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = shape.tie_word_embeddings
        self.input_tensor: Tensor | None = None
        seq_length, visual_seq_length = config.data.seq_length, config.data.visual_seq_length
        student_segments = (seq_length, visual_seq_length) if objective.laver else (seq_length,)

        def decoder(segments: tuple[int, ...], decoder_config: TransformerConfig) -> nn.Module:
            return build_decoder(
                decoder_config,
                self.streams.kernel,
                segments,
                is_last_stage=post_process,
                vp_stage=vp_stage,
            )

        def vision_head() -> VisionHead:
            return VisionHead(
                megatron_config,
                objective.vision_head_hidden_size,
                objective.vision_head_output_size or shape.hidden_size,
            )

        self.encoder: ImageEncoder | None = None
        if pre_process:
            self._build_input_side(encoder)
        self.decoder = decoder(student_segments, megatron_config)
        if post_process:
            self._build_output_layer()
            if objective.laver:
                self.vision_head = vision_head()
        self.teacher: Teacher | None = None
        if objective.laver:
            teachers = decoder((visual_seq_length,), teacher_config(config, megatron_config))
            self.teacher = Teacher(teachers, vision_head() if post_process else None)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        self.to(torch.cuda.current_device())

    def _build_input_side(self, encoder: ImageEncoder | None) -> None:
        self.embedding = LanguageModelEmbedding(
            config=self.config,
            vocab_size=self.shape.vocab_size,
            max_sequence_length=self.run_config.data.seq_length,
            position_embedding_type="none",
            scatter_to_sequence_parallel=False,
            tp_group=self.tp_group,
        )
        if encoder is None:
            assert not self.run_config.objective.laver, "the visual objective needs an image encoder"
            return
        self.encoder = encoder
        dtype = self.config.params_dtype
        self.connector = Connector(encoder.feature_size, self.shape.hidden_size, dtype)
        mark_partial([encoder, self.connector])
        if self.run_config.objective.laver:
            self.mask_token = nn.Parameter(torch.full((self.shape.hidden_size,), float("nan"), dtype=dtype))

    def _build_output_layer(self) -> None:
        self.output_layer = ColumnParallelLinear(
            self.shape.hidden_size,
            self.shape.vocab_size,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            tp_group=self.tp_group,
            skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            disable_grad_reduce=True,
        )
        # The stage gathers the sequence once for both heads (see `_whole_sequence`).
        self.output_layer.sequence_parallel = False

    @torch.no_grad()
    def initialise_new_parts(self, seed: int) -> None:
        """Start values of what no Qwen2.5 checkpoint has: connector, [MASK] (N(0, 0.02)) and vision head."""
        if self.encoder is not None:
            self.connector.initialise("connector.", seed)
            if self.run_config.objective.laver:
                self.mask_token.copy_(seeded_normal("mask_token", (self.shape.hidden_size,), 0.02, seed))
        if self.post_process and self.run_config.objective.laver:
            self.vision_head.initialise("vision_head.", seed)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The student's tensors as Megatron-Core shards them. The teacher is not among them: a checkpoint
        holds it once, as the fp32 accumulators of `laver_megatron.model.teacher`."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}teacher.")}

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Called by Megatron-Core's schedules with what the previous stage sent."""
        assert len(input_tensor) == 1
        self.input_tensor = input_tensor[0]

    def forward(self, batch: MicroBatch, pixels: list[Tensor] | None) -> Tensor | StageOutput:
        """batch: the micro-batch; pixels: those of its images that this tensor-parallel rank encodes (`own_images`), in
        order, on the first stage only. Returns the stage's output tensor, or a StageOutput on the last stage."""
        target_TK = None
        if self.pre_process:
            student_LBH, teacher_VBH, target_TK = self._embed(batch, pixels or [])
        else:
            student_LBH, teacher_VBH = self._received()
        if self.training and torch.is_grad_enabled() and not student_LBH.requires_grad:
            # Activation recompute gives layers no gradient at all when their input needs none.
            student_LBH.requires_grad_()
        student_LBH = self.decoder(
            hidden_states=student_LBH,
            attention_mask=batch.student_spans_B2L,
            rotary_pos_emb=self.streams.rotary_table(batch.student_positions_3BL),
        )
        if self.teacher is not None:
            assert batch.teacher_positions_3BV is not None
            with torch.no_grad():
                teacher_VBH = self.teacher.decoder(
                    hidden_states=teacher_VBH,
                    attention_mask=batch.teacher_spans_B2V,
                    rotary_pos_emb=self.streams.rotary_table(batch.teacher_positions_3BV),
                )
        if self.post_process:
            return self._heads(student_LBH, teacher_VBH, target_TK, batch)
        return student_LBH if teacher_VBH is None else torch.cat([student_LBH, teacher_VBH])

    def _received(self) -> tuple[Tensor, Tensor | None]:
        assert self.input_tensor is not None
        if self.teacher is None:
            return self.input_tensor, None
        ranks = self._num_sequence_ranks
        num_student = (self.run_config.data.seq_length + self.run_config.data.visual_seq_length) // ranks
        return self.input_tensor[:num_student], self.input_tensor[num_student:].detach()

    @property
    def _num_sequence_ranks(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size() if self.config.sequence_parallel else 1

    def _embed(self, batch: MicroBatch, pixels: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The three parts of the input, the student's `[S + V, B, H]` and the teacher's `[V, B, H]`; and the target of
        reconstruction `[T, K]`, None if it is the teacher's output."""
        words_SBH = self.embedding(input_ids=batch.tokens_BS, position_ids=None)
        student_LBH, teacher_VBH, target_TK = words_SBH, None, None
        if self.encoder is None:
            self._refuse_images(batch, pixels)
        else:
            tokens_TH, target_TK = self._visual_tokens(batch, pixels)
            student_LBH = _with_rows(words_SBH, batch.language_rows_T, tokens_TH)
        if self.teacher is not None:
            num_slots = self.run_config.data.visual_seq_length
            empty_VBH = words_SBH.new_zeros(num_slots, *words_SBH.shape[1:])
            masked_TH = torch.where(batch.masked_T[:, None], self.mask_token, tokens_TH)
            student_LBH = torch.cat([student_LBH, _with_rows(empty_VBH, batch.visual_rows_T, masked_TH)])
            teacher_VBH = _with_rows(empty_VBH, batch.visual_rows_T, tokens_TH.detach())
        if self.config.sequence_parallel:
            student_LBH = scatter_to_sequence_parallel_region(student_LBH, group=self.tp_group)
            if teacher_VBH is not None:
                teacher_VBH = scatter_to_sequence_parallel_region(teacher_VBH, group=self.tp_group)
        return student_LBH, teacher_VBH, target_TK

    def _refuse_images(self, batch: MicroBatch, pixels: list[Tensor]) -> None:
        num_images = max(len(batch.image_num_tokens), len(pixels))
        if num_images:
            raise ValueError(
                f"the model has no image encoder, but the micro-batch holds {num_images} images; leave the images "
                "out, or build the model with an encoder"
            )

    def _visual_tokens(self, batch: MicroBatch, pixels: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Encoder and connector on the images of the micro-batch, divided over the tensor-parallel ranks; all of their
        visual tokens in order, `[T, H]`, and the target that is made of the images, `[T, K]`."""
        num_tokens, kind = batch.image_num_tokens, self.run_config.objective.mim_target
        features_tE = self._encode(pixels, num_tokens)
        own_tH = self.connector(features_tE).to(self.config.params_dtype)
        tokens_TH = gather_visual_tokens(own_tH, num_tokens, self.tp_group, self.image_cost)
        if self.teacher is None or kind == "latent":
            return tokens_TH, None
        assert self.encoder is not None and self.post_process, "validation lets no other run have this target"
        size = self.encoder.token_size
        target_TK = reconstruction_target(kind, pixels, features_tE, num_tokens, size, self.tp_group, self.image_cost)
        return tokens_TH, target_TK

    def _encode(self, pixels: list[Tensor], num_tokens: Sequence[int]) -> Tensor:
        """The features of this rank's images: `[t, E]`. num_tokens: of all images of the micro-batch."""
        assert self.encoder is not None
        own = divide_images(num_tokens, self.tp_group.size(), self.image_cost)[self.tp_group.rank()]
        if len(pixels) != len(own):
            raise ValueError(f"got {len(pixels)} images for {len(own)} places in the micro-batch")
        trains = any(parameter.requires_grad for parameter in self.encoder.parameters())
        if pixels:
            with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
                features_tE = self.encoder(pixels)
        else:
            # Without an image the graph must be there all the same: its backward pass holds collectives further on.
            weight = self.connector.linear_1.weight
            features_tE = weight.new_zeros(0, self.encoder.feature_size, requires_grad=trains)
        expected = sum(num_tokens[image] for image in own)
        if features_tE.shape[0] != expected:
            raise ValueError(
                f"the encoder yields {features_tE.shape[0]} visual tokens for {len(pixels)} images, but the text "
                f"holds {expected} image tokens; was it prepared for another encoder?"
            )
        return features_tE.to(self.config.params_dtype)

    def _whole_sequence(self, hidden: Tensor) -> Tensor:
        """The sequence on every tensor-parallel rank. The column-parallel heads that read it leave its
        gradient split over the ranks; it is summed here, once for all of them."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)

    def _heads(
        self, student_LBH: Tensor, teacher_VBH: Tensor | None, target_TK: Tensor | None, batch: MicroBatch
    ) -> StageOutput:
        """Logits where losses need them: at rows with a label, and at visual tokens."""
        hidden_LBH = self._whole_sequence(student_LBH)
        seq_length = self.run_config.data.seq_length
        shared_weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        language_logits, _ = self.output_layer(_rows(hidden_LBH[:seq_length], batch.label_rows_R), weight=shared_weight)
        if self.teacher is None:
            return StageOutput(language_logits, None, None)
        assert teacher_VBH is not None
        with torch.no_grad():
            teacher_logits = self.teacher.vision_head(_rows(self._whole_sequence(teacher_VBH), batch.visual_rows_T))
        student_logits = self.vision_head(_rows(hidden_LBH[seq_length:], batch.visual_rows_T))
        return StageOutput(language_logits, student_logits, teacher_logits, target_TK)


def _rows(stream_LBH: Tensor, rows_N: Tensor) -> Tensor:
    """Rows of a flattened stream, `[N, H]`."""
    return stream_LBH.flatten(0, 1).index_select(0, rows_N)


def _with_rows(stream_LBH: Tensor, rows_T: Tensor, tokens_TH: Tensor) -> Tensor:
    """The stream with some of its flattened rows replaced: `[L, B, H]`."""
    # Unlike index_copy it keeps nothing but the rows for the backward pass.
    return stream_LBH.flatten(0, 1).index_put((rows_T,), tokens_TH).view_as(stream_LBH)
