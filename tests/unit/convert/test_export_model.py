"""The exported model's code against the reference of the parity tests, and against itself where it is used otherwise.

Letters: B sequences, L tokens, H width, W vocabulary.
"""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Qwen2ForCausalLM

from laver_megatron.convert.export import modeling_laver
from laver_megatron.convert.export.modeling_laver import LaverConfig, LaverForConditionalGeneration
from laver_megatron.model.positions import language_positions, rotary_angles
from tests import oracles
from tests.exports import write_export
from tests.packs import pack
from tests.parity import IMAGE_SIZE, TOLERANCE, Checkpoints, Reference, parity_config, write_checkpoints

IMAGE_TOKEN = 127
GRID = (4, 4)
KINDS = [(attention, positions) for attention in ("mixed", "causal") for positions in ("1d", "2d", "mrope")]

# Sequences of different lengths with two images, one image, none, two images that touch, and an image at the end.
PROMPTS = ([3, GRID, 2, GRID, 4], [GRID, 5], [9], [2, GRID, GRID, 1], [4, GRID])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Checkpoints]:
    """Random weights, by whether embedding and LM head are tied."""
    return {
        tied: write_checkpoints(tmp_path_factory.mktemp("checkpoints"), tied=tied, num_layers=3)
        for tied in (True, False)
    }


@pytest.fixture(scope="module")
def reference(checkpoints: dict[bool, Checkpoints]) -> Callable[..., Reference]:
    """The parity tests' reference; tied for 1d positions, so that both kinds occur."""

    @functools.cache
    def make(attention: str, positions: str) -> Reference:
        files = checkpoints[positions == "1d"]
        config = parity_config(files, attention=attention, positions=positions, laver=False)
        return Reference(config, files).eval()

    return make


@pytest.fixture(scope="module")
def export(
    checkpoints: dict[bool, Checkpoints], reference: Callable[..., Reference], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The directory of an export of the reference's weights."""

    @functools.cache
    def make(attention: str, positions: str, format: str = "laver") -> Path:
        source, files = reference(attention, positions), checkpoints[positions == "1d"]
        return write_export(
            tmp_path_factory.mktemp("exports") / f"{format}-{attention}-{positions}",
            source.language,
            source.encoder,
            source.connector,
            text_config=json.loads((files.model / "config.json").read_text()),
            vision_config=json.loads((files.encoder / "config.json").read_text()),
            attention=attention,
            positions=positions,
            image_token_id=IMAGE_TOKEN,
            format=format,
        )

    return make


def load(directory: Path, **options) -> LaverForConditionalGeneration:
    """An export as the model, which must find every weight and no other."""
    model, found = LaverForConditionalGeneration.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model.eval()


def inputs_of(prompts=PROMPTS, *, padding_side: str = "left") -> dict[str, Tensor]:
    """input_ids, attention_mask and pixel_values of sequences written as in `tests.packs`."""
    packs = [pack(prompt, image_size=IMAGE_SIZE, seed=seed) for seed, prompt in enumerate(prompts)]
    length = max(p.tokens_BS.shape[1] for p in packs)
    rows, masks = [], []
    for p in packs:
        tokens_L = torch.where(p.image_BS[0] >= 0, IMAGE_TOKEN, p.tokens_BS[0].clamp(max=IMAGE_TOKEN - 1))
        missing = length - len(tokens_L)
        sides = (missing, 0) if padding_side == "left" else (0, missing)
        rows.append(torch.nn.functional.pad(tokens_L, sides, value=0))
        masks.append(torch.nn.functional.pad(torch.ones_like(tokens_L), sides, value=0))
    inputs = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
    pixels = [image for p in packs for images in p.pixels for image in images]
    return {**inputs, "pixel_values": torch.stack(pixels)} if pixels else inputs


def alone(number: int) -> dict[str, Tensor]:
    """One of the prompts by itself, without padding; the pictures are the same as in the batch."""
    inputs = inputs_of()
    keep_L = inputs["attention_mask"][number].bool()
    counts = [sum(segment == GRID for segment in prompt) for prompt in PROMPTS]
    single = {"input_ids": inputs["input_ids"][number : number + 1, keep_L]}
    if counts[number]:
        single["pixel_values"] = inputs["pixel_values"].split(counts)[number]
    return single


@torch.no_grad()
def reference_logits(reference: Reference, number: int) -> Tensor:
    """Logits `[L, W]` of one prompt from explicit masks and positions."""
    packs = pack(PROMPTS[number], image_size=IMAGE_SIZE, seed=number)
    packs.tokens_BS.clamp_(max=IMAGE_TOKEN - 1)
    return reference(packs, torch.zeros_like(packs.image_BS, dtype=torch.bool)).language_logits_BSW[0]


def real_logits(logits_BLW: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The logits of each sequence without those at padding."""
    return [row[keep.bool()] for row, keep in zip(logits_BLW, inputs["attention_mask"], strict=True)]


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1, "too small for the tolerance to mean anything"
    worst = (ours - theirs).abs().max().item()
    assert worst <= tolerance, f"differ by {worst:.2e}"


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(("attention", "positions"), KINDS)
@torch.no_grad()
def test_a_padded_batch_gives_the_logits_of_the_reference(attention, positions, padding_side, export, reference):
    inputs = inputs_of(padding_side=padding_side)
    logits = real_logits(load(export(attention, positions))(**inputs).logits, inputs)
    for number, ours in enumerate(logits):
        assert_close(ours, reference_logits(reference(attention, positions), number))


@torch.no_grad()
def test_the_kinds_differ(export):
    """The weights are such that a wrong mask or wrong positions would show in the test above."""
    logits = [
        LaverForConditionalGeneration.from_pretrained(export("mixed", "2d"), attention=attention, positions=positions)
        .eval()(**alone(0))
        .logits
        for attention, positions in KINDS
    ]
    for one, other in itertools.combinations(logits, 2):
        assert (one - other).abs().max() > 100 * TOLERANCE


@pytest.mark.processes
@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
@torch.no_grad()
def test_kernels_agree(kernel, export):
    if kernel == "flex_attention" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch compiles the mask of flex_attention, with types that it lacks without vector instructions")
    inputs = inputs_of()
    sdpa = load(export("mixed", "2d"), attn_implementation="sdpa")(**inputs).logits
    options = {"text_config": kernel, "vision_config": "eager"}
    other = load(export("mixed", "2d"), attn_implementation=options)
    assert other.language_model.config._attn_implementation == kernel
    theirs = other(**inputs, use_cache=False).logits
    assert_close(torch.cat(real_logits(theirs, inputs)), torch.cat(real_logits(sdpa, inputs)))


@torch.no_grad()
def test_text_alone_is_qwen(export, reference):
    inputs = inputs_of([[9], [14]])
    qwen = Qwen2ForCausalLM.from_pretrained(reference("mixed", "2d").language.name_or_path).eval()
    ours = load(export("mixed", "2d"))(**inputs).logits
    theirs = qwen(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits
    assert_close(torch.cat(real_logits(ours, inputs)), torch.cat(real_logits(theirs, inputs)))


@torch.no_grad()
def answer_without_cache(model: LaverForConditionalGeneration, inputs: dict[str, Tensor], length: int) -> Tensor:
    """Greedy answer, every token from a pass over the whole sequence."""
    ids = inputs["input_ids"]
    for _ in range(length):
        logits = model(input_ids=ids, pixel_values=inputs.get("pixel_values"), use_cache=False).logits[:, -1]
        logits[:, IMAGE_TOKEN] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, inputs["input_ids"].shape[1] :]


GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize(("attention", "positions"), [("mixed", "2d"), ("mixed", "mrope"), ("causal", "1d")])
def test_generate_gives_what_whole_passes_give(attention, positions, options, export):
    """Batch with left padding, images before, behind and around the text, and a row of text alone."""
    model, inputs = load(export(attention, positions)), inputs_of()
    answers = model.generate(**inputs, **GREEDY, **options)[:, inputs["input_ids"].shape[1] :]
    for number in range(len(PROMPTS)):
        expected = answer_without_cache(model, alone(number), 6)[0]
        assert answers[number].tolist() == expected.tolist(), number


def test_beams_keep_their_pictures(export):
    """Rows with several images: repeating each picture by itself would exchange them between rows."""
    model, inputs = load(export("mixed", "2d")), inputs_of()
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for number in range(len(PROMPTS)):
        single = model.generate(**alone(number), **options)[:, alone(number)["input_ids"].shape[1] :]
        assert together[2 * number : 2 * number + 2].tolist() == single.tolist(), number


def test_an_image_token_is_never_an_answer(export):
    model = load(export("mixed", "2d"))
    with torch.no_grad():
        model.language_model.lm_head.weight[IMAGE_TOKEN] = 100 * model.language_model.lm_head.weight[5]
    answer = model.generate(**alone(1), **{**GREEDY, "do_sample": True}, num_return_sequences=4)
    assert IMAGE_TOKEN not in answer[:, alone(1)["input_ids"].shape[1] :]


@pytest.mark.parametrize("positions", ["1d", "2d", "mrope"])
@torch.no_grad()
def test_a_cache_is_continued_piece_by_piece(positions, export):
    """Text, an image, single tokens and a second image, each in a call of its own, give what one call gives."""
    model, inputs = load(export("mixed", positions)), alone(0)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    whole = model(**inputs).logits
    cache, parts, pictures = None, [], 0
    for start, end in ((0, 2), (2, 20), (20, 21), (21, 37), (37, 38), (38, ids.shape[1])):
        piece = ids[:, start:end]
        count = int((piece == IMAGE_TOKEN).sum()) // 16
        output = model(
            input_ids=piece,
            pixel_values=pixels[pictures : pictures + count] if count else None,
            past_key_values=cache,
            use_cache=True,
        )
        cache, pictures = output.past_key_values, pictures + count
        parts.append(output.logits)
    assert pictures == 2
    assert_close(torch.cat(parts, dim=1), whole)


def test_a_conversation_goes_on_from_its_cache(export):
    """`generate` is handed the cache of an answer, the whole text so far, and the new picture only."""
    model, first, second = load(export("mixed", "2d")), alone(0), alone(1)
    answer = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([answer.sequences, second["input_ids"]], dim=1)
    going_on = model.generate(
        input_ids=ids, pixel_values=second["pixel_values"], past_key_values=answer.past_key_values, **GREEDY
    )
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    assert going_on.tolist() == model.generate(input_ids=ids, pixel_values=pixels, **GREEDY).tolist()


@torch.no_grad()
def test_positions_may_be_given(export):
    model, inputs = load(export("mixed", "2d")), alone(3)
    packs = pack(PROMPTS[3])
    position_3BL = language_positions(packs.document_BS, packs.image_BS, packs.row_BS, packs.col_BS, "2d")
    assert_close(model(**inputs, position_ids=position_3BL).logits, model(**inputs).logits, tolerance=0)
    with pytest.raises(ValueError, match=r"shape \(1, 35\) do not say where the tokens of images stand"):
        model(**inputs, position_ids=torch.arange(35)[None])
    text, count_BL = alone(2), torch.arange(9)[None]
    assert_close(model(**text, position_ids=count_BL).logits, model(**text).logits, tolerance=0)
    # With 1d positions there is nothing that a count would not say.
    plain = load(export("mixed", "1d"))
    assert_close(plain(**inputs, position_ids=torch.arange(35)[None]).logits, plain(**inputs).logits, tolerance=0)


@pytest.mark.parametrize("positions", ["1d", "2d", "mrope"])
@pytest.mark.parametrize("grids", [3 * [(4, 4)], [(2, 6), (2, 6), (5, 1)], [(1, 1), (1, 7), (3, 2)]])
def test_positions_by_definition(positions, grids):
    """Images of any size, of which the small models above have only one; two tokens of padding before the prompt,
    which continues five earlier tokens."""
    first, second, third = grids
    packs = pack([3, first, second, 2, third, 1])
    ids_BL = torch.nn.functional.pad(torch.where(packs.image_BS >= 0, IMAGE_TOKEN, 1), (2, 0), value=0)
    places = modeling_laver.locate_images(ids_BL, IMAGE_TOKEN, grids)
    for found_BL, expected_BS in zip(places, (packs.image_BS, packs.row_BS, packs.col_BS), strict=True):
        assert found_BL[:, 2:].tolist() == expected_BS.tolist()
    found_3BL, next_B = modeling_laver.count_positions(*places, ids_BL != 0, torch.tensor([5]), positions)
    expected = [[5 + index for index in token] for token in oracles.language_positions(packs, positions)[0]]
    assert found_3BL[:, 0, 2:].T.tolist() == expected
    assert next_B.item() == expected[-1][0] + 1


@pytest.mark.parametrize("positions", ["1d", "2d", "mrope"])
def test_angles_are_those_of_training_also_in_bf16(positions, export):
    """bf16 holds 8 bits: angles computed in it would be wrong by whole turns at position 2000."""
    model = load(export("mixed", positions), dtype=torch.bfloat16).to(torch.bfloat16)
    rotary = model.language_model.model.rotary_emb
    position_3BL = torch.randint(0, 2048, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    if positions == "1d":
        position_3BL = position_3BL[:1].expand(3, -1, -1)
    cos, sin = rotary(torch.zeros(2, 7, 64, dtype=torch.bfloat16), position_3BL)
    angles = rotary_angles(position_3BL, rotary.head_dim, rotary.theta, positions)[:, :, 0].transpose(0, 1)
    assert cos.dtype == sin.dtype == torch.bfloat16
    for found, expected in ((cos, angles.cos()), (sin, angles.sin())):
        # One rounding to 8 bits, whose side the last bit of an fp32 cosine may decide.
        torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-6)


@torch.no_grad()
def test_bf16_runs_near_fp32(export):
    inputs = inputs_of()
    half = load(export("mixed", "2d"), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ours = torch.cat(real_logits(half(**inputs).logits, inputs)).float()
    theirs = torch.cat(real_logits(load(export("mixed", "2d"))(**inputs).logits, inputs))
    # bf16 rounds to 1 in 256 at every operation of three layers, on logits of deviation 1.6.
    assert (ours - theirs).abs().mean() < 0.1
    assert half.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 6


def test_loss_gradients_and_what_is_kept(export):
    model, inputs = load(export("mixed", "2d")), inputs_of()
    labels = torch.where((inputs["input_ids"] == IMAGE_TOKEN) | (inputs["attention_mask"] == 0), -100, 0)
    labels = torch.where(labels == 0, inputs["input_ids"], labels)
    output = model(**inputs, labels=labels, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(output.loss.item() - expected.item()) < 1e-5
    assert len(output.hidden_states) == model.config.text_config.num_hidden_layers + 1
    # Products of other numbers of rows, and of other memory, are summed in another order.
    logits = {
        "of the last hidden states": model.language_model.lm_head(output.hidden_states[-1]),
        "of the last two": torch.cat([output.logits[:, :-2], model(**inputs, logits_to_keep=2).logits], dim=1),
        "as a tuple": model(**inputs, return_dict=False)[0],
    }
    for name, found in logits.items():
        torch.testing.assert_close(found, output.logits, atol=1e-5, rtol=1e-5, msg=name)
    output.loss.backward()
    # The last layer, the final norm and the pooling head of the encoder lie behind the feature layer.
    unused = ("vision_tower.encoder.layers.1", "vision_tower.post_layernorm", "vision_tower.head")
    silent = {
        name.replace("vision_tower.vision_model.", "vision_tower.")
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.any()
    }
    assert silent and all(name.startswith(unused) for name in silent), silent


def test_recomputed_activations_give_the_same_gradients(export):
    gradients = []
    model = load(export("mixed", "2d")).train()
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**alone(0), labels=alone(0)["input_ids"]).loss.backward()
        gradients.append(model.multi_modal_projector.linear_1.weight.grad)
    # fp32 rounding: what is computed again need not lie in memory as it did.
    assert float((gradients[0] - gradients[1]).norm()) <= 1e-6 * float(gradients[0].norm()) > 0


def test_saving_writes_the_names_that_were_read(export, tmp_path):
    from safetensors import safe_open

    for positions in ("1d", "2d"):
        directory = export("mixed", positions)
        load(directory).save_pretrained(tmp_path / positions)
        names = [set(safe_open(path / "model.safetensors", "pt").keys()) for path in (directory, tmp_path / positions)]
        assert names[0] == names[1]
        assert ("language_model.lm_head.weight" in names[0]) == (positions == "2d")
        # Saved again, the config still says all that the model needs.
        assert_close(load(tmp_path / positions)(**alone(0)).logits, load(directory)(**alone(0)).logits, tolerance=0)


# --- llava -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["causal", "mixed"])
@torch.no_grad()
def test_llava_computes_the_same_where_its_mask_is_the_same(attention, export):
    stock, found = LlavaForConditionalGeneration.from_pretrained(
        export(attention, "1d", "llava"), output_loading_info=True
    )
    assert not any(found.values()), found
    assert getattr(stock.config, "is_mm_prefix_lm", False) == (attention == "mixed")
    model = load(export(attention, "1d"))
    for number in range(len(PROMPTS)):
        inputs, packs = alone(number), pack(PROMPTS[number])
        ours = model(**inputs).logits
        mask_B1LL = oracles.language_mask(packs, attention).unsqueeze(1)
        assert_close(stock.eval()(**inputs, attention_mask=mask_B1LL).logits, ours)
        if attention == "causal":
            assert_close(stock(**inputs).logits, ours)
        elif "pixel_values" in inputs:
            # What the export's README warns of.
            assert (stock(**inputs).logits - ours).abs().max() > 100 * TOLERANCE


# --- what is refused ---------------------------------------------------------------------------------------


def test_counts_that_do_not_match_are_refused_with_numbers(export):
    model, inputs = load(export("mixed", "2d")), alone(0)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with pytest.raises(ValueError, match=r"32 image tokens.*1 images of 16 tokens \(4 x 4\)"):
        model(input_ids=ids, pixel_values=pixels[:1])
    with pytest.raises(ValueError, match="32 image tokens.*0 images"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="0 image tokens.*2 images"):
        model(input_ids=ids.clamp(max=5), pixel_values=pixels)
    with pytest.raises(ValueError, match="2 pixel_values with inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids), pixel_values=pixels)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 16, 16\).*32, 32"):
        model(input_ids=ids, pixel_values=pixels[..., :16, :16])


def test_images_that_are_cut_are_refused():
    grids = [(4, 4), (4, 4)]
    halves = torch.tensor([[9] * 24 + [1], [9] * 8 + [1] * 17])
    with pytest.raises(ValueError, match="sequence 1 of the batch does not hold the 16 image tokens"):
        modeling_laver.locate_images(halves, 9, grids)
    torn = torch.tensor([[1] * 18, [9] * 8 + [1] + [9] * 8 + [1]])
    with pytest.raises(ValueError, match=r"sequence 1 of the batch does not hold.*\(4 x 4\) of an image in one piece"):
        modeling_laver.locate_images(torn, 9, grids[:1])
    exchanged = torch.tensor([[9] * 6 + [1] * 4, [9] * 4 + [1] * 6])
    modeling_laver.locate_images(exchanged, 9, [(2, 3), (2, 2)])
    with pytest.raises(ValueError, match=r"sequence 1 .*6 image tokens \(2 x 3\).*in the order of the text"):
        modeling_laver.locate_images(exchanged, 9, [(2, 2), (2, 3)])


@pytest.mark.parametrize(("attention", "positions"), KINDS)
def test_flash_attention_is_refused_where_it_would_be_wrong(attention, positions, export):
    """Set behind the back of transformers, which refuses earlier where the kernel is not installed."""
    model = load(export(attention, positions))
    model.language_model.config._attn_implementation_internal = "flash_attention_2"
    if (attention, positions) == ("causal", "1d"):
        model._refuse_kernel()
        return
    with pytest.raises(ValueError, match="'flash_attention_2' cannot compute this model.*eager, sdpa"):
        model(**alone(0))


@torch.no_grad()
def test_a_cache_that_does_not_belong_is_refused(export):
    model, inputs = load(export("mixed", "2d")), alone(2)
    cache = model(**inputs, use_cache=True).past_key_values
    step = {"input_ids": torch.tensor([[3]]), "past_key_values": cache}
    with pytest.raises(ValueError, match="attention_mask is 1 tokens long, but there are 9 in the cache and 1 new"):
        model(**step, attention_mask=torch.ones(1, 1))
    del cache.laver_offset_B
    with pytest.raises(ValueError, match="not filled by this model"):
        model(**step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "prefix"}, "attention is 'prefix'.*mixed, causal"),
        ({"positions": "3d"}, "positions is '3d'.*1d, 2d, mrope"),
        ({"text_config": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}}, "rotary scaling of type 'linear'"),
        ({"text_config": {"use_sliding_window": True, "max_window_layers": 0}}, "sliding-window"),
    ],
)
def test_configs_that_mean_something_else_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LaverConfig(**change)
