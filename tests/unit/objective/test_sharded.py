"""Sharded objective against the unsharded one, values and gradients, on Gloo processes.

Four processes are started once for the file: two tensor-parallel groups of two, then one of four. Each rank
computes on its slice of the same seeded logits and saves what it got; the tests put the slices together.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from megatron.core import parallel_state

from laver_megatron.objective import sharded
from laver_megatron.objective.gram import cosine_gram, gram_losses, inner_products
from laver_megatron.objective.language import IGNORE_LABEL, language_losses
from laver_megatron.objective.reconstruction import reconstruction_losses, teacher_entropies
from laver_megatron.objective.regression import smooth_l1_losses, standardised

pytestmark = pytest.mark.processes

WORLD_SIZE, WIDTH, IMAGE_SIZES = 4, 12, (5, 1, 8)
TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.04}
# fp64 in and through: only the order of the sums differs. The gradients reach a few hundred.
FP64 = {"rtol": 1e-11, "atol": 1e-11}
# Megatron's cross-entropy computes in fp32.
FP32 = {"rtol": 1e-5, "atol": 1e-6}


def make_inputs():
    """Logits whose maxima lie in different shards, rows far from zero, labels everywhere, ignored ones."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student_TK, teacher_TK = draw(9, WIDTH), draw(9, WIDTH)
    student_TK[4] += 300
    teacher_TK[5] -= 200
    return {
        "student": student_TK,
        "teacher": teacher_TK,
        "centre": draw(WIDTH) * 0.2,
        "weights": draw(9),
        "logits": draw(9, WIDTH) * 3,
        "labels": torch.tensor([0, 11, IGNORE_LABEL, 3, 5, 6, IGNORE_LABEL, 8, 2]),
        "student_images": [draw(size, WIDTH) for size in IMAGE_SIZES],
        "teacher_images": [draw(size, WIDTH) for size in IMAGE_SIZES],
    }


def shard(tensor, group):
    """This rank's slice of the last dimension, a leaf of its own."""
    if group is None or group.size() == 1:
        return tensor.clone().requires_grad_(tensor.is_floating_point())
    return tensor.chunk(group.size(), dim=-1)[group.rank()].clone().requires_grad_()


def reconstruct(inputs, group, centred):
    student_TK, teacher_TK = shard(inputs["student"], group), shard(inputs["teacher"], group)
    centre_K = shard(inputs["centre"], group).detach() if centred else None
    losses_T = sharded.sharded_reconstruction_losses(student_TK, teacher_TK, group, centre_K=centre_K, **TEMPERATURES)
    (losses_T * inputs["weights"]).sum().backward()
    assert teacher_TK.grad is None
    entropies_T = sharded.sharded_teacher_entropies(teacher_TK, centre_K, 0.04, group)
    assert not entropies_T.requires_grad
    return {"losses": losses_T.detach(), "gradient": student_TK.grad, "entropies": entropies_T}


def regress(inputs, group):
    prediction_TK = shard(inputs["student"], group)
    target_TK = sharded.sharded_standardised(shard(inputs["teacher"], group), group)
    losses_T = sharded.sharded_smooth_l1_losses(prediction_TK, target_TK, group)
    (losses_T * inputs["weights"]).sum().backward()
    return {"losses": losses_T.detach(), "gradient": prediction_TK.grad, "target": target_TK}


def anchor(inputs, group, kind, together):
    students = [shard(z_NK, group) for z_NK in inputs["student_images"]]
    teachers = [shard(z_NK, group).detach() for z_NK in inputs["teacher_images"]]
    if together:
        products = sharded.sharded_inner_products(students + teachers, group)
    else:
        products = [sharded.sharded_inner_products([z_NK], group)[0] for z_NK in students + teachers]
    pairs = zip(products[: len(students)], products[len(students) :], strict=True)
    losses = torch.stack(
        [gram_losses(cosine_gram(student_NN), cosine_gram(teacher_NN), kind) for student_NN, teacher_NN in pairs]
    )
    losses.sum().backward()
    return {"losses": losses.detach(), "gradients": [z_NK.grad for z_NK in students]}


def speak(inputs, group, dtype):
    logits_TW = shard(inputs["logits"].to(dtype), group)
    before_TW = logits_TW.detach().clone()
    losses_T = sharded.sharded_language_losses(logits_TW, inputs["labels"], group)
    (losses_T * inputs["weights"]).sum().backward()
    unchanged = torch.equal(logits_TW.detach(), before_TW)
    return {"losses": losses_T.detach(), "gradient": logits_TW.grad, "unchanged": unchanged}


def nothing(group):
    """No masked token and no image anywhere: still a call of all ranks, and a gradient of the right shape."""
    student_TK = torch.empty(0, 3, requires_grad=True)
    losses_T = sharded.sharded_reconstruction_losses(
        student_TK, torch.empty(0, 3), group, centre_K=None, **TEMPERATURES
    )
    losses_T.sum().backward()
    return tuple(student_TK.grad.shape), sharded.sharded_inner_products([], group)


def check_all(group):
    inputs = make_inputs()
    return {
        "plain": reconstruct(inputs, group, centred=False),
        "centred": reconstruct(inputs, group, centred=True),
        "smooth-l1": regress(inputs, group),
        "ga": anchor(inputs, group, "ga", together=False),
        "cga": anchor(inputs, group, "cga", together=True),
        "language": speak(inputs, group, torch.float32),
        "language_bf16": speak(inputs, group, torch.bfloat16),
        "nothing": nothing(group),
    }


def count_all_reduces(group):
    """All-reduces of the Gram products of many images, and of one reconstruction, forward and backward."""
    inputs, counts, all_reduce = make_inputs(), [], dist.all_reduce

    def counted(*args, **kwargs):
        counts[-1] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    try:
        counts.append(0)
        anchor(inputs, group, "cga", together=True)
        counts.append(0)
        student_TK, teacher_TK = shard(inputs["student"], group), shard(inputs["teacher"], group)
        sharded.sharded_reconstruction_losses(
            student_TK, teacher_TK, group, centre_K=None, **TEMPERATURES
        ).sum().backward()
    finally:
        dist.all_reduce = all_reduce
    return counts


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    for size in (2, 4):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
        group = parallel_state.get_tensor_model_parallel_group()
        results = check_all(group)
        results["all_reduces"] = count_all_reduces(group)
        if size == 2:
            results["alone"] = check_all(parallel_state.get_pipeline_model_parallel_group())
        torch.save(results, f"{folder}/{size}-{rank}.pt")
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Per tensor-parallel size: the results of the ranks of one group."""
    folder = tmp_path_factory.mktemp("sharded")
    # Forks of a server that has imported torch. There is one for all tests of a process, and whoever is first says what
    # it imports: an import that fails half-way would stay with all of them.
    multiprocessing.set_forkserver_preload(["tests.distributed.preload"])
    multiprocessing.start_processes(worker, (str(folder),), WORLD_SIZE, start_method="forkserver")
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in (2, 4)}


@pytest.fixture(params=[2, 4])
def ranks(request, saved):
    return saved[request.param]


def joined(ranks, case, name="gradient"):
    return torch.cat([rank[case][name] for rank in ranks], dim=-1)


@pytest.mark.parametrize("case", ["plain", "centred"])
def test_reconstruction(ranks, case):
    inputs = make_inputs()
    centre_K = inputs["centre"] if case == "centred" else None
    student_TK = inputs["student"].requires_grad_()
    losses_T = reconstruction_losses(student_TK, inputs["teacher"], centre_K=centre_K, **TEMPERATURES)
    (losses_T * inputs["weights"]).sum().backward()
    entropies_T = teacher_entropies(inputs["teacher"], centre_K, 0.04)
    for rank in ranks:
        torch.testing.assert_close(rank[case]["losses"], losses_T.detach(), **FP64)
        torch.testing.assert_close(rank[case]["entropies"], entropies_T, **FP64)
    torch.testing.assert_close(joined(ranks, case), student_TK.grad, **FP64)


def test_smooth_l1(ranks):
    inputs = make_inputs()
    prediction_TK, target_TK = inputs["student"].requires_grad_(), standardised(inputs["teacher"])
    losses_T = smooth_l1_losses(prediction_TK, target_TK)
    (losses_T * inputs["weights"]).sum().backward()
    for rank in ranks:
        torch.testing.assert_close(rank["smooth-l1"]["losses"], losses_T.detach(), **FP64)
    torch.testing.assert_close(joined(ranks, "smooth-l1", "target"), target_TK, **FP64)
    torch.testing.assert_close(joined(ranks, "smooth-l1"), prediction_TK.grad, **FP64)


@pytest.mark.parametrize("kind", ["ga", "cga"])
def test_gram(ranks, kind):
    inputs = make_inputs()
    for image, student_NK in enumerate(inputs["student_images"]):
        student_NK.requires_grad_()
        teacher_NN = inner_products(inputs["teacher_images"][image])
        loss = gram_losses(cosine_gram(inner_products(student_NK)), cosine_gram(teacher_NN), kind)
        loss.backward()
        for rank in ranks:
            torch.testing.assert_close(rank[kind]["losses"][image], loss.detach(), **FP64)
        gradient_NK = torch.cat([rank[kind]["gradients"][image] for rank in ranks], dim=-1)
        torch.testing.assert_close(gradient_NK, student_NK.grad, **FP64)


@pytest.mark.parametrize(("case", "dtype"), [("language", torch.float32), ("language_bf16", torch.bfloat16)])
def test_language(ranks, case, dtype):
    inputs = make_inputs()
    logits_TW = inputs["logits"].to(dtype).requires_grad_()
    losses_T = language_losses(logits_TW, inputs["labels"])
    (losses_T * inputs["weights"]).sum().backward()
    ignored_T = inputs["labels"] == IGNORE_LABEL
    for rank in ranks:
        torch.testing.assert_close(rank[case]["losses"], losses_T.detach(), **FP32)
        assert (rank[case]["losses"][ignored_T] == 0).all()
        assert (rank[case]["gradient"][ignored_T] == 0).all()
        assert rank[case]["unchanged"]
    # A bf16 gradient is rounded to 8 bits once, on either side: one unit in the last place.
    tolerance = FP32 if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(joined(ranks, case), logits_TW.grad, **tolerance)


def test_few_collectives(ranks):
    for rank in ranks:
        assert rank["all_reduces"] == [1, 2]


def test_nothing_masked_and_no_image(ranks):
    for rank in ranks:
        assert rank["nothing"] == ((0, 3), [])


def test_without_a_group_it_is_the_unsharded_objective(saved):
    """Also before any process group exists, and with a group of one."""
    alone = check_all(None)
    inputs = make_inputs()
    losses_T = reconstruction_losses(inputs["student"], inputs["teacher"], centre_K=inputs["centre"], **TEMPERATURES)
    torch.testing.assert_close(alone["centred"]["losses"], losses_T, **FP32)
    for rank in saved[2]:
        # Another process, whose memory is laid out otherwise.
        torch.testing.assert_close(rank["alone"], alone, **FP32)
