import os

import pytest
import torch

from laver_megatron.data.batch.shared_buffers import SharedBuffers


def test_buffers_are_used_again():
    buffers = SharedBuffers(100)
    first, second = buffers.take(), buffers.take()
    assert first != second
    buffers.memory(first)[:3] = 7
    buffers.give_back(first)
    assert buffers.take() == first and buffers.memory(first)[:4].tolist() == [7, 7, 7, 0]
    assert buffers.take() not in (first, second)
    buffers.close()


@pytest.mark.processes
def test_other_processes_see_them_also_those_taken_after_the_fork():
    buffers, go_read, done_write = SharedBuffers(100), *map(list, (os.pipe(), os.pipe()))
    child = os.fork()
    if child == 0:
        number = os.read(go_read[0], 1)[0]
        buffers.memory(number)[0] = 5
        os.write(done_write[1], b"x")
        os._exit(0)
    buffers.take()
    number = buffers.take()
    os.write(go_read[1], bytes([number]))
    os.read(done_write[0], 1)
    os.waitpid(child, 0)
    assert buffers.memory(number)[0] == 5 and buffers.memory(0)[0] == 0


def test_what_is_mapped_outlives_the_file():
    buffers = SharedBuffers(8)
    memory = buffers.memory(buffers.take())
    memory[:] = 3
    buffers.close()
    buffers.close()
    assert memory.sum() == 3 * len(memory)
    with pytest.raises(AssertionError, match="closed"):
        buffers.take()


def test_many_buffers_need_few_files():
    """A process may have 1024 open by default."""
    buffers = SharedBuffers(100)
    before = len(os.listdir("/proc/self/fd"))
    numbers = [buffers.take() for _ in range(1000)]
    for number in numbers:
        buffers.memory(number)[:2] = torch.tensor([number % 256, number // 256], dtype=torch.uint8)
    assert len(os.listdir("/proc/self/fd")) - before < 10
    assert [int(low) + 256 * int(high) for low, high in (buffers.memory(number)[:2] for number in numbers)] == numbers
    buffers.close()
