"""The free list of KV blocks."""

import random

import pytest

from llm_engine.block_pool import BlockPool


@pytest.mark.parametrize("seed", range(20))
def test_random_takes_and_returns_keep_every_block_in_one_place(seed):
    source = random.Random(seed)
    pool = BlockPool(source.randint(1, 40), 16)
    owned: list[list[int]] = []
    for _ in range(300):
        count = source.randint(0, 10)
        if source.random() < 0.5 and pool.can_take(count):
            owned.append(pool.take(count))
            assert len(owned[-1]) == count
        elif owned:
            pool.give_back(owned.pop(source.randrange(len(owned))))
        held = [block for blocks in owned for block in blocks]
        assert len(held) == len(set(held)) == pool.taken_count
        assert set(held) <= set(range(pool.block_count))
        assert pool.free_count + pool.taken_count == pool.block_count
        assert pool.can_take(pool.free_count) and not pool.can_take(pool.free_count + 1)


def test_a_block_returned_twice_is_a_mistake():
    pool = BlockPool(2, 16)
    blocks = pool.take(1)
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="free already"):
        pool.give_back(blocks)


def test_taking_more_than_is_free_is_a_mistake():
    with pytest.raises(AssertionError):
        BlockPool(2, 16).take(3)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_are_counted_rounded_up(tokens, blocks):
    assert BlockPool(4, 16).blocks_for(tokens) == blocks
