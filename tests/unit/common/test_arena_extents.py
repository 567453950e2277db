"""The arithmetic of free extents, by hand and by a seeded random run."""

from __future__ import annotations

import random

import pytest

from tidegate.common.arena_extents import ALIGNMENT_BYTES, FreeExtents, aligned

BEGIN = 4096
END = BEGIN + 64 * ALIGNMENT_BYTES


def check_invariants(extents: FreeExtents, taken: dict[int, int]) -> None:
    """Free and taken extents tile the range: in order, without a gap or an overlap, free ones never touching."""
    free = extents.extents()
    assert sum(length for _, length in free) == extents.free_byte_count
    pieces = sorted([(offset, length, True) for offset, length in free] + [(o, n, False) for o, n in taken.items()])
    place = BEGIN
    was_free = False
    for offset, length, is_free in pieces:
        assert offset == place
        assert length > 0 and length % ALIGNMENT_BYTES == 0
        assert not (is_free and was_free)
        place, was_free = offset + length, is_free
    assert place == END


def test_lengths_are_rounded_up_to_the_alignment() -> None:
    extents = FreeExtents(BEGIN, END)
    assert extents.take(1) == BEGIN
    assert extents.take(65) == BEGIN + 64
    assert extents.free_byte_count == END - BEGIN - 3 * ALIGNMENT_BYTES


def test_a_full_range_gives_nothing_and_works_again_after_a_give() -> None:
    extents = FreeExtents(BEGIN, END)
    assert extents.take(END - BEGIN) == BEGIN
    assert extents.take(1) is None
    extents.give(BEGIN, END - BEGIN)
    assert extents.take(1) == BEGIN


def test_the_next_search_goes_on_behind_the_last_place() -> None:
    extents = FreeExtents(BEGIN, END)
    offsets = [extents.take(64) or 0 for _ in range(64)]
    extents.give(offsets[20], 64)
    assert extents.take(64) == offsets[20]
    for number in (5, 10, 30):
        extents.give(offsets[number], 64)
    assert [extents.take(64) for _ in range(4)] == [offsets[30], offsets[5], offsets[10], None]


def test_neighbours_are_merged_on_both_sides() -> None:
    extents = FreeExtents(BEGIN, END)
    first, second, third = (extents.take(64) or 0 for _ in range(3))
    extents.take(END - BEGIN - 3 * 64)
    extents.give(first, 64)
    extents.give(third, 64)
    assert extents.extents() == [(first, 64), (third, 64)]
    extents.give(second, 64)
    assert extents.extents() == [(first, 192)]


@pytest.mark.parametrize("offset", [BEGIN - 64, BEGIN + 1, END, END - 64])
def test_a_place_that_is_not_all_free_is_not_taken(offset: int) -> None:
    extents = FreeExtents(BEGIN, END)
    assert not extents.take_at(offset, 128)
    assert extents.free_byte_count == END - BEGIN


def test_a_place_can_be_taken_once() -> None:
    extents = FreeExtents(BEGIN, END)
    assert extents.take_at(BEGIN + 640, 100)
    assert not extents.take_at(BEGIN + 704, 10)
    check_invariants(extents, {BEGIN + 640: 128})


@pytest.mark.parametrize("seed", range(8))
def test_random_use_keeps_the_invariants(seed: int) -> None:
    rng = random.Random(seed)
    extents = FreeExtents(BEGIN, END)
    taken: dict[int, int] = {}
    for _ in range(400):
        if taken and rng.random() < 0.45:
            offset = rng.choice(list(taken))
            extents.give(offset, taken.pop(offset))
        else:
            wanted = rng.randint(1, 600)
            place = extents.take(wanted)
            if place is None:
                assert all(length < wanted for _, length in extents.extents())
            else:
                taken[place] = aligned(wanted)
        check_invariants(extents, taken)
