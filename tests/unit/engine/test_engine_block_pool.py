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


def test_the_lowest_free_blocks_go_first_in_whichever_order_they_came_back():
    pool = BlockPool(8, 16)
    first, second, third = pool.take(2), pool.take(3), pool.take(1)
    for blocks in (first, second):
        pool.give_back(blocks)
    assert third == [5]
    assert pool.take(6) == [0, 1, 2, 3, 4, 6]


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


def test_known_blocks_are_kept_until_their_place_is_wanted_the_oldest_first():
    pool = BlockPool(4, 16)
    first, second = pool.take(2), pool.take(1)
    for block, key in zip([*first, *second], [b"a", b"ab", b"c"], strict=True):
        pool.know(block, key)
    pool.give_back(first)
    pool.give_back(second)
    assert pool.free_count == 4
    assert pool.find([b"a", b"ab", b"no"]) == first
    assert pool.find([b"no", b"a"]) == []
    pool.take(1)
    assert pool.known_count == 3, "a block that holds nothing known goes before them"
    pool.take(1)
    assert pool.find([b"a", b"ab"]) == first[:1], "a text's end goes before its beginning"
    pool.take(1)
    assert pool.find([b"a"]) == []
    assert pool.find([b"c"]) == second


def test_a_shared_block_is_free_when_its_last_owner_returns_it():
    pool = BlockPool(4, 16)
    blocks = pool.take(2)
    pool.know(blocks[0], b"a")
    pool.share(blocks[:1])
    assert pool.is_shared(blocks[0])
    assert pool.freed_by([blocks]) == 1
    assert pool.freed_by([blocks, blocks[:1]]) == 2
    pool.give_back(blocks)
    assert pool.taken_count == 1
    pool.give_back(blocks[:1])
    assert pool.taken_count == 0
    pool.share(pool.find([b"a"]))
    assert pool.taken_count == 1


def test_what_is_known_twice_is_found_once():
    pool = BlockPool(4, 16)
    first, second = pool.take(1), pool.take(1)
    pool.know(first[0], b"a")
    pool.know(second[0], b"a")
    pool.know(first[0], b"b")
    assert pool.find([b"a"]) == first
    assert pool.find([b"b"]) == []
    pool.forget([*first, *second])
    assert pool.find([b"a"]) == []
    pool.give_back([*first, *second])
    assert pool.free_count == 4


def test_a_free_block_that_is_forgotten_stays_free():
    pool = BlockPool(2, 16)
    blocks = pool.take(2)
    pool.know(blocks[0], b"a")
    pool.give_back(blocks)
    pool.forget(blocks)
    assert (pool.free_count, pool.known_count) == (2, 0)
    assert sorted(pool.take(2)) == sorted(blocks)


def test_sharing_what_is_not_known_is_a_mistake():
    pool = BlockPool(2, 16)
    with pytest.raises(AssertionError, match="not known"):
        pool.share(pool.take(1))
