"""The step plan: what runs, what waits, who gives way."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import llm_engine
from llm_engine.batcher import Batcher, StepPlan
from llm_engine.block_pool import BlockPool
from llm_engine.request import SequenceRequest
from llm_engine.sequence import Sequence
from llm_engine.window import FULL, Window

WINDOWS = {"all": FULL, "six": Window(newest=6, begins_at=13, sinks=3), "four": Window(newest=4, begins_at=4, sinks=0)}
RUNS = [(name, seed) for name in WINDOWS for seed in range(60 if name == "all" else 20)]


def sequence(name: str, prompt: int, *, arrival: int = 0, priority: int = 0, tokens: int = 8) -> Sequence:
    request = SequenceRequest(request_id=name, token_ids=[0] * prompt, max_tokens=tokens, priority=priority)
    return Sequence(
        request=request,
        arrival_index=arrival,
        token_ids=[0] * prompt,
        prompt_token_count=prompt,
        seed=0,
        stop_token_ids=frozenset(),
    )


def batcher(blocks: int = 16, *, running: int = 4, waiting: int = 8, budget: int = 8, window: Window = FULL) -> Batcher:
    pool = BlockPool(blocks, 4)
    return Batcher(pool, max_sequences=running, max_waiting=waiting, step_token_budget=budget, window=window)


def carry_out(batcher: Batcher, plan: StepPlan, right_count: int = 0) -> None:
    """Do what the engine does: commit, append a token and what was right of drafts, end what is at its bound."""
    sampling = [(work.sequence, work.draft_token_ids[:right_count]) for work in plan.work if work.samples]
    batcher.commit(plan)
    for each, right in sampling:
        left = each.request.max_tokens - each.output_token_count
        each.token_ids += [*right, 0][:left]
        batcher.accept(each, min(len(right), left))
        if each.output_token_count >= each.request.max_tokens:
            batcher.remove(each.request_id)


def planned(batcher: Batcher, source: random.Random, *, drafts: bool) -> StepPlan:
    """A plan, whose prompts may be bound; `drafts`: of all lengths."""
    plan = batcher.plan(source.choice((None, 1, 2, 5)))
    if not drafts:
        return plan
    with_drafts = batcher.with_drafts(
        plan, lambda sequence, most: source.choices([0, 1, 9], k=min(most, source.randint(0, 9)))
    )
    assert with_drafts.preempted == plan.preempted
    assert [(w.sequence, w.start, w.count) for w in with_drafts.work] == [
        (w.sequence, w.start, w.count) for w in plan.work
    ]
    return with_drafts


def told(batcher: Batcher, plan: StepPlan) -> str:
    work = " ".join(
        f"{w.sequence.request_id}[{w.start}:{w.start + w.count}]"
        + f"+{len(w.draft_token_ids)}" * bool(w.draft_token_ids)
        for w in plan.work
    )
    lost = " ".join(f"-{name}" for name in plan.preempted)
    return " ".join(part for part in (work, lost, f"free={batcher.pool.free_count}") if part)


def run_script(script: str, **settings) -> None:
    """Lines of `add NAME PROMPT [PRIORITY]`, `cancel NAME`, or `step: PLAN` with the plan expected."""
    subject = batcher(**settings)
    for number, line in enumerate(filter(None, map(str.strip, script.splitlines()))):
        command, _, rest = line.partition(" ")
        if command == "add":
            name, prompt, *priority = rest.split()
            subject.add(sequence(name, int(prompt), arrival=number, priority=int(*priority or [0])))
        elif command == "cancel":
            assert subject.remove(rest) is not None
        else:
            plan = subject.plan()
            assert told(subject, plan) == rest, f"line {number}: {line}"
            carry_out(subject, plan)


def test_a_long_prompt_is_computed_in_chunks_beside_running_decodes():
    run_script(
        """
        add a 3
        step: a[0:3] free=15
        add b 20
        step: a[3:4] b[0:7] free=10
        step: a[4:5] b[7:14] free=9
        step: a[5:6] b[14:20] free=9
        step: a[6:7] b[20:21] free=8
        """
    )


def test_the_more_urgent_is_admitted_first_and_then_the_earlier():
    run_script(
        """
        add late 4 1
        add a 4
        add b 4
        step: a[0:4] b[0:4] free=14
        step: a[4:5] b[4:5] late[0:4] free=11
        """
    )


def test_the_first_in_line_is_not_overtaken_by_one_that_would_fit():
    run_script(
        """
        add a 8
        step: a[0:8] free=2
        add big 8
        add small 1
        step: a[8:9] free=1
        cancel a
        step: big[0:8] free=2
        """,
        blocks=4,
    )


def test_the_least_urgent_gives_way_and_is_computed_again():
    run_script(
        """
        add b 8 1
        add a 6
        step: a[0:6] b[0:8] free=1
        step: a[6:7] b[8:9] free=0
        step: a[7:8] b[9:10] free=0
        step: a[8:9] -b free=2
        step: a[9:10] free=2
        cancel a
        step: b[0:11] free=2
        """,
        blocks=5,
        budget=16,
    )


def test_a_sequence_that_lacks_a_block_gives_way_itself_if_it_is_the_least_urgent():
    subject = batcher(blocks=5)
    for index, (name, prompt) in enumerate([("a", 6), ("b", 8)]):
        subject.add(sequence(name, prompt, arrival=index))
    carry_out(subject, subject.plan())
    carry_out(subject, subject.plan())
    subject.pool.take(subject.pool.free_count)
    plan = subject.plan()
    assert plan.preempted == ("b",)
    assert [work.sequence.request_id for work in plan.work] == ["a"]


def test_a_strictly_more_urgent_one_pauses_the_least_urgent_which_goes_on_where_it_was():
    run_script(
        """
        add a 3 1
        add b 3 1
        step: a[0:3] b[0:3] free=14
        add u 4
        step: a[3:4] u[0:4] free=13
        step: u[4:5] a[4:5] free=11
        cancel u
        step: a[5:6] b[3:4] free=13
        """,
        running=2,
    )


def test_one_that_is_as_urgent_waits_and_pauses_nobody():
    run_script(
        """
        add a 3 1
        step: a[0:3] free=15
        add b 3 1
        step: a[3:4] free=15
        cancel a
        step: b[0:3] free=15
        """,
        running=1,
    )


def test_of_two_paused_ones_the_earlier_goes_on_first():
    run_script(
        """
        add a 3 1
        add b 3 1
        step: a[0:3] b[0:3] free=14
        add u 2
        add v 2
        step: u[0:2] v[0:2] free=12
        cancel u
        step: v[2:3] a[3:4] free=13
        cancel v
        step: a[4:5] b[3:4] free=13
        """,
        running=2,
    )


def test_a_paused_one_gives_its_blocks_to_a_newcomer_that_needs_them_and_is_computed_again():
    run_script(
        """
        add a 8 1
        step: a[0:8] free=2
        add u 12
        step: u[0:8] -a free=1
        step: u[8:12] free=1
        cancel u
        step: a[0:8] free=1
        step: a[8:9] free=1
        """,
        blocks=4,
        running=1,
    )


def test_a_paused_one_gives_its_blocks_to_a_running_one_that_grows():
    run_script(
        """
        add a 3 1
        step: a[0:3] free=2
        add u 7
        step: u[0:7] free=0
        step: u[7:8] free=0
        step: u[8:9] -a free=0
        """,
        blocks=3,
        running=1,
    )


def test_a_prompt_that_is_paused_half_way_goes_on_at_its_next_chunk():
    run_script(
        """
        add a 20 1
        step: a[0:8] free=11
        add u 2
        step: u[0:2] free=10
        cancel u
        step: a[8:16] free=11
        """,
        running=1,
    )


def test_the_more_urgent_prompt_is_computed_before_the_rest_of_one_that_began():
    run_script(
        """
        add a 20 1
        step: a[0:8] free=11
        add u 6
        step: u[0:6] a[8:10] free=9
        """
    )


def test_where_blocks_lack_a_strictly_more_urgent_one_takes_those_of_the_least_urgent():
    run_script(
        """
        add a 12 1
        step: a[0:8] free=1
        add equal 8 1
        step: a[8:12] free=1
        cancel equal
        add u 8
        step: u[0:8] -a free=2
        """,
        blocks=4,
    )


def test_one_that_may_pause_another_is_never_refused_for_want_of_a_place():
    subject = batcher(running=2, waiting=0)
    for index in range(2):
        subject.add(sequence(f"batch{index}", 1, arrival=index, priority=1))
    carry_out(subject, subject.plan())
    assert not subject.can_add(1)
    for index in range(2):
        assert subject.can_add(0)
        subject.add(sequence(f"urgent{index}", 1, arrival=2 + index))
    assert not subject.can_add(0), "both that could be paused are spoken for"
    carry_out(subject, subject.plan())
    assert [each.request_id for each in subject.running] == ["urgent0", "urgent1"]
    assert [each.request_id for each in subject.waiting] == ["batch0", "batch1"]
    assert not subject.can_add(0)


def test_cancelling_a_paused_one_frees_its_blocks():
    subject = batcher(running=1)
    subject.add(sequence("a", 3, priority=1))
    carry_out(subject, subject.plan())
    subject.add(sequence("u", 4, arrival=1))
    carry_out(subject, subject.plan())
    assert subject.pool.taken_count == 2
    subject.remove("a")
    assert subject.pool.taken_count == 1


def test_cancelling_frees_blocks_at_once_and_an_unknown_name_is_none():
    subject = batcher()
    subject.add(sequence("a", 9))
    subject.plan()
    assert subject.pool.taken_count == 3
    assert subject.remove("a").request_id == "a"
    assert subject.pool.taken_count == 0
    assert subject.remove("a") is None


def test_running_and_waiting_places_together_bound_what_is_held():
    subject = batcher(running=2, waiting=1)
    for index in range(3):
        assert subject.can_add()
        subject.add(sequence(str(index), 1, arrival=index))
    assert not subject.can_add()
    subject.remove("1")
    assert subject.can_add()


def test_a_window_gives_back_what_it_leaves_behind():
    run_script(
        """
        add a 9
        step: a[0:8] free=1
        step: a[8:9] free=1
        step: a[9:10] free=1
        step: a[10:11] free=1
        step: a[11:12] free=1
        step: a[12:13] free=0
        step: a[13:14] free=1
        step: a[14:15] free=1
        step: a[15:16] free=1
        """,
        blocks=4,
        window=Window(newest=6, begins_at=11, sinks=3),
    )


def test_a_prompt_longer_than_the_pool_is_computed_within_it():
    window = Window(newest=6, begins_at=13, sinks=3)
    subject = batcher(window.most_blocks(8, 4), window=window)
    subject.add(sequence("a", 200))
    while subject.running or subject.waiting:
        plan = subject.plan()
        assert plan.work and not plan.preempted
        carry_out(subject, plan)
    assert subject.pool.taken_count == 0


def pool_size(source: random.Random, most: int, window: Window, budget: int) -> int:
    """Of a pool in which any sequence comes to its end."""
    least = 6 if window is FULL else window.most_blocks(budget, 4)
    return source.randint(least, max(most, least))


def longest_prompt(subject: Batcher) -> int:
    return subject.pool.block_count * 4 - 8 if subject.window is FULL else 120


@pytest.mark.parametrize(("name", "seed"), RUNS)
def test_random_runs_keep_the_invariants_and_finish_everything(name, seed):
    window, source = WINDOWS[name], random.Random(seed)
    running = source.randint(1, 6)
    budget = source.randint(running, 24)
    subject = batcher(pool_size(source, 24, window, budget), running=running, waiting=6, budget=budget, window=window)
    longest = longest_prompt(subject)
    accepted, ended, prefix_computed = set(), set(), {}
    for moment in range(2000):
        priority = source.randint(0, 2)
        if moment < 200 and source.random() < 0.4 and subject.can_add(priority):
            new = sequence(
                str(moment),
                source.randint(1, longest),
                arrival=moment,
                priority=priority,
                tokens=source.randint(1, 8),
            )
            subject.add(new)
            accepted.add(new.request_id)
        if source.random() < 0.03 and (held := [*subject.running, *subject.waiting]):
            ended.add(subject.remove(source.choice(held).request_id).request_id)
        before = {each.request_id for each in (*subject.running, *subject.waiting)}
        plan = planned(subject, source, drafts=bool(seed % 2))
        check_plan(subject, plan)
        assert bool(plan.work) == bool(before), "work is planned whenever there is any"
        prefix_computed |= {w.sequence.request_id: w.start + w.count for w in plan.work}
        carry_out(subject, plan, source.randint(0, 9))
        check_state(subject)
        ended |= before - {each.request_id for each in (*subject.running, *subject.waiting)}
        if moment >= 200 and not (subject.running or subject.waiting):
            break
    assert accepted and ended == accepted
    assert subject.pool.taken_count == 0


def check_plan(subject: Batcher, plan: StepPlan) -> None:
    names = [work.sequence.request_id for work in plan.work]
    assert len(names) == len(set(names))
    assert 0 <= plan.token_count <= subject.step_token_budget
    for work in plan.work:
        assert work.count > 0
        assert work.start == work.sequence.computed_token_count
        assert work.start + work.row_count <= covered(subject, work.sequence)
        assert not work.draft_token_ids or work.sequence.pending_token_count == 1
        if subject.window is not FULL:
            held = len(work.sequence.block_ids)
            assert held <= subject.window.most_blocks(subject.step_token_budget, 4)
    for each in subject.running:
        if each.pending_token_count == 1:
            assert each.request_id in names, "a decode never misses a step"
    if plan.preempted:
        worst = max((each.urgency for each in subject.running), default=(-1, -1))
        kept_out = {each.request_id: each.urgency for each in subject.waiting}
        assert all(kept_out[name] > worst for name in plan.preempted if name in kept_out)


def covered(subject: Batcher, sequence: Sequence) -> int:
    """Tokens up to which a sequence has all blocks but the hidden ones."""
    return (len(sequence.block_ids) + len(subject.window.hidden_blocks(sequence.computed_token_count, 4))) * 4


def check_state(subject: Batcher) -> None:
    running, waiting = subject.running, subject.waiting
    paused = [each for each in waiting if each.block_ids]
    blocks = [block for each in (*running, *paused) for block in each.block_ids]
    assert len(blocks) == len(set(blocks)) == subject.pool.taken_count
    assert len(running) <= subject.max_sequences
    assert not {each.request_id for each in running} & {each.request_id for each in waiting}
    assert all(each.block_ids or each.computed_token_count == 0 for each in waiting)
    assert all(each.computed_token_count <= covered(subject, each) for each in (*running, *paused))
    assert all(one.urgency < other.urgency for one in running for other in paused)
    assert len(running) + len(waiting) <= 2 * subject.max_sequences + subject.max_waiting
    assert all(0 < each.computed_token_count < each.token_count for each in running)
    for queue in (running, waiting):
        assert list(queue) == sorted(queue, key=lambda each: each.urgency)


def test_planning_needs_neither_torch_nor_numpy_random_nor_a_clock():
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, llm_engine.batcher; print(*sys.modules)"],
        cwd=Path(llm_engine.__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "llm_engine.batcher" in loaded
    assert not {"torch", "grpc", "triton_python_backend_utils", "tidegate"} & set(loaded)


class Contents:
    """What lies in the blocks, as the model would have written it: checks that each sequence finds its own text."""

    def __init__(self, subject: Batcher) -> None:
        self._subject = subject
        self._cells: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}

    def check_and_write(self, plan: StepPlan) -> None:
        for work in plan.work:
            for place in set(range(work.start)) - set(self._subject.window.hidden(work.start)):
                assert self._cells[self._cell(work.sequence, place)] == _text(work.sequence, place)
            for place in range(work.start, work.start + work.count):
                cell = self._cell(work.sequence, place)
                assert not self._subject.pool.is_shared(cell[0]), "nobody writes to a shared block"
                self._cells[cell] = _text(work.sequence, place)
            for place in range(work.start + work.count, work.start + work.row_count):
                cell = self._cell(work.sequence, place)
                assert not self._subject.pool.is_shared(cell[0]), "nobody writes to a shared block"
                drafts = work.draft_token_ids[: place - work.start - work.count + 1]
                self._cells[cell] = work.sequence.request.cache_salt, (*work.sequence.token_ids, *drafts)

    def _cell(self, sequence: Sequence, place: int) -> tuple[int, int]:
        hidden = self._subject.window.hidden_blocks(sequence.computed_token_count, 4)
        index = place // 4 if place // 4 < hidden.start else place // 4 - len(hidden)
        return sequence.block_ids[index], place % 4


def _text(sequence: Sequence, place: int) -> tuple[str, tuple[int, ...]]:
    """What a key and value depend on: all tokens up to it; and whose they are."""
    return sequence.request.cache_salt, tuple(sequence.token_ids[: place + 1])


def text(
    name: str, tokens: list[int], *, arrival: int = 0, salt: str = "", priority: int = 0, most: int = 4
) -> Sequence:
    request = SequenceRequest(request_id=name, token_ids=tokens, max_tokens=most, cache_salt=salt, priority=priority)
    return Sequence(request, arrival, list(tokens), len(tokens), seed=0, stop_token_ids=frozenset())


def reusing(blocks: int = 16, *, running: int = 4, budget: int = 16, window: Window = FULL) -> Batcher:
    return Batcher(
        BlockPool(blocks, 4),
        max_sequences=running,
        max_waiting=8,
        step_token_budget=budget,
        reuses_prefixes=True,
        window=window,
    )


def run_alone(subject: Batcher, sequence: Sequence) -> list[tuple[int, int]]:
    """From where to where each step computes it."""
    subject.add(sequence)
    spans = []
    while subject.running or subject.waiting:
        plan = subject.plan()
        spans += [(work.start, work.start + work.count) for work in plan.work]
        carry_out(subject, plan)
    return spans


def test_a_prompt_begins_where_another_one_left_its_blocks():
    subject = reusing()
    assert run_alone(subject, text("a", list(range(10)), most=1)) == [(0, 10)]
    assert subject.pool.taken_count == 0
    assert subject.pool.known_count == 2
    again = text("b", [*range(9), 99, 98], most=1)
    assert run_alone(subject, again) == [(8, 11)]
    assert again.cached_token_count == 8
    assert subject.cached_token_total == 8


def test_a_prompt_that_is_known_whole_computes_its_last_block():
    subject = reusing()
    run_alone(subject, text("a", list(range(8)), most=1))
    assert run_alone(subject, text("b", list(range(8)), most=1)) == [(4, 8)]


def test_an_answer_is_a_prefix_of_the_next_turn():
    subject = reusing()
    first = text("a", list(range(7)), most=6)
    run_alone(subject, first)
    assert run_alone(subject, text("b", [*first.token_ids, 50, 51], most=1)) == [(12, 15)]


def test_nobody_else_finds_the_blocks_of_a_salt():
    subject = reusing()
    run_alone(subject, text("a", list(range(8)), salt="one", most=1))
    for salt in ("", "two", "on"):
        assert run_alone(subject, text(f"b{salt}", list(range(8)), salt=salt, most=1)) == [(0, 8)]
    assert run_alone(subject, text("c", list(range(8)), salt="one", most=1)) == [(4, 8)]


def test_running_sequences_share_and_the_last_one_leaves_the_blocks_known():
    subject = reusing()
    subject.add(text("a", list(range(9)), most=8))
    carry_out(subject, subject.plan())
    subject.add(text("b", list(range(9)), arrival=1, most=8))
    carry_out(subject, subject.plan())
    a, b = subject.running
    assert a.block_ids[:2] == b.block_ids[:2]
    assert a.block_ids[2] != b.block_ids[2]
    assert subject.pool.taken_count == 4
    subject.remove("a")
    assert subject.pool.taken_count == 3
    subject.remove("b")
    assert subject.pool.taken_count == 0
    assert subject.pool.known_count == 2


def test_a_preempted_sequence_finds_its_blocks_again():
    subject = reusing(blocks=3, running=1)
    late = text("late", list(range(9)), priority=1, most=3)
    subject.add(late)
    carry_out(subject, subject.plan())
    subject.add(text("urgent", [70, 71], arrival=1, most=1))
    plan = subject.plan()
    assert plan.preempted == ("late",)
    assert late.block_ids == []
    carry_out(subject, plan)
    assert [(work.start, work.count) for work in subject.plan().work] == [(8, 2)]
    assert late.cached_token_count == 0, "what it left itself is not counted"


def test_blocks_that_a_window_left_behind_are_still_found_and_hidden_ones_are_not_taken():
    subject = reusing(window=Window(newest=6, begins_at=13, sinks=3))
    run_alone(subject, text("a", list(range(25)), most=1))
    assert subject.pool.known_count == 6
    again = text("b", [*range(24), 99], most=2)
    subject.add(again)
    plan = subject.plan()
    assert again.cached_token_count == 24
    assert subject.pool.taken_count == len(again.block_ids) == 4
    carry_out(subject, plan)
    assert subject.pool.taken_count == len(again.block_ids) == 3


def test_spoiled_blocks_are_found_by_nobody_and_cleaned_by_their_last_owner():
    subject = reusing()
    subject.add(text("a", list(range(9)), most=8))
    carry_out(subject, subject.plan())
    subject.add(text("b", list(range(9)), arrival=1, most=8))
    carry_out(subject, subject.plan())
    a, b = subject.running
    assert subject.spoiled_blocks(a) == a.block_ids[2:]
    subject.remove("a")
    assert subject.spoiled_blocks(b) == b.block_ids
    subject.remove("b")
    assert subject.pool.known_count == 0
    assert run_alone(subject, text("c", list(range(9)), most=1)) == [(0, 9)]


@pytest.mark.parametrize(("name", "seed"), RUNS)
def test_random_runs_that_share_find_their_own_text_and_keep_the_counts(name, seed):
    window, source = WINDOWS[name], random.Random(seed)
    running = source.randint(1, 6)
    budget = source.randint(running, 24)
    subject = reusing(pool_size(source, 30, window, budget), running=running, budget=budget, window=window)
    contents = Contents(subject)
    longest = longest_prompt(subject)
    accepted, ended, reused = set(), set(), 0
    for moment in range(3000):
        priority = source.randint(0, 2)
        if moment < 400 and source.random() < 0.4 and subject.can_add(priority):
            # Few beginnings, so that many are alike; then whatever.
            beginning = [source.randint(0, 1)] * source.randint(1, longest)
            tokens = (beginning + [source.randint(0, 3) for _ in range(source.randint(0, 6))])[:longest]
            salt = source.choice(["", "other"])
            new = text(str(moment), tokens, arrival=moment, salt=salt, priority=priority, most=source.randint(1, 8))
            subject.add(new)
            accepted.add(new.request_id)
        if source.random() < 0.03 and (held := [*subject.running, *subject.waiting]):
            ended.add(subject.remove(source.choice(held).request_id).request_id)
        before = {each.request_id for each in (*subject.running, *subject.waiting)}
        plan = planned(subject, source, drafts=bool(seed % 2))
        check_plan(subject, plan)
        assert bool(plan.work) == bool(before)
        contents.check_and_write(plan)
        if source.random() < 0.05:
            continue  # Given up: the next plan computes it again.
        carry_out(subject, plan, source.randint(0, 9))
        holders = [each for each in (*subject.running, *subject.waiting) if each.block_ids]
        owners = Counter(block for each in holders for block in each.block_ids)
        assert len(owners) == subject.pool.taken_count
        assert all(subject.pool.is_shared(block) == (count > 1) for block, count in owners.items())
        assert all(each.computed_token_count < each.token_count for each in holders)
        ended |= before - {each.request_id for each in (*subject.running, *subject.waiting)}
        reused = subject.cached_token_total
        if moment >= 400 and not (subject.running or subject.waiting):
            break
    assert accepted and ended == accepted
    assert subject.pool.taken_count == 0
    # What a window leaves behind goes first where blocks are scarce.
    assert reused > 0 or window is not FULL


def test_prompts_beside_decodes_are_cut_to_their_bound_and_alone_they_are_not():
    subject = batcher(blocks=64, budget=20)
    subject.add(sequence("a", 4))
    carry_out(subject, subject.plan(5))
    subject.add(sequence("b", 30, arrival=1))
    subject.add(sequence("c", 3, arrival=2))
    assert told(subject, subject.plan(5)).startswith("a[4:5] b[0:5] ")
    subject.remove("a")
    assert told(subject, subject.plan(5)).startswith("b[0:20] ")


def test_a_prompt_that_would_pause_another_waits_where_the_bound_is_used_up():
    subject = batcher(blocks=64, running=3, budget=20)
    subject.add(sequence("a", 4, priority=1))
    carry_out(subject, subject.plan())
    subject.add(sequence("later", 30, arrival=1, priority=2))
    carry_out(subject, subject.plan(5))
    subject.add(sequence("c", 9, arrival=2, priority=1))
    subject.add(sequence("d", 9, arrival=3, priority=1))
    assert told(subject, subject.plan(5)).startswith("a[5:6] c[0:5] ")
    assert "d" not in [each.request_id for each in subject.running]


def test_a_prompt_that_is_more_urgent_than_a_decode_is_not_bound_and_takes_nothing_of_the_bound():
    subject = batcher(blocks=64, running=6, budget=20)
    for name, priority in (("a", 0), ("b", 2)):
        subject.add(sequence(name, 4, priority=priority))
    carry_out(subject, subject.plan())
    for arrival, (name, priority) in enumerate((("urgent", 1), ("less", 2), ("last", 2)), 1):
        subject.add(sequence(name, 9, arrival=arrival, priority=priority))
    assert told(subject, subject.plan(5)).startswith("a[4:5] b[4:5] urgent[0:9] less[0:5] free")
    subject.remove("b")
    assert told(subject, subject.plan(5)).startswith("a[4:5] urgent[0:5] free")


@pytest.mark.parametrize("bound", [1, 3])
def test_several_prompts_share_the_bound(bound):
    subject = batcher(blocks=64, budget=20)
    subject.add(sequence("a", 4))
    carry_out(subject, subject.plan())
    for index in range(3):
        subject.add(sequence(f"b{index}", 2, arrival=index + 1))
    plan = subject.plan(bound)
    assert sum(work.count for work in plan.work if work.sequence.request_id != "a") <= bound
    assert len(plan.work) > 1


def drafts_of(count: int):
    """Proposes so many drafts for everybody, or as many as are wanted."""
    return lambda sequence, most: [0] * min(count, most)


def decoding(*names: str, **settings) -> Batcher:
    """Sequences of three tokens in blocks of four, their prompts computed."""
    subject = batcher(**settings)
    for index, name in enumerate(names):
        subject.add(sequence(name, 3, arrival=index))
    carry_out(subject, subject.plan())
    return subject


def test_drafts_take_what_is_left_of_the_budget():
    subject = decoding("a", "b", budget=8)
    plan = subject.with_drafts(subject.plan(), drafts_of(4))
    assert told(subject, plan) == "a[3:4]+4 b[3:4]+2 free=12"
    assert plan.token_count == 8


def test_a_prompts_piece_is_not_drafted_behind():
    subject = batcher(budget=9)
    subject.add(sequence("a", 10))
    for expected in ("a[0:9] free=13", "a[9:10]+4 free=12"):
        plan = subject.with_drafts(subject.plan(), drafts_of(4))
        assert told(subject, plan) == expected
        carry_out(subject, plan)


def test_nobody_loses_blocks_for_a_draft():
    subject = decoding("a", "b", blocks=3)
    plan = subject.with_drafts(subject.plan(), drafts_of(2))
    assert told(subject, plan) == "a[3:4]+2 b[3:4] free=0"
    carry_out(subject, plan)
    # Both have come to a block's end: the one that a's drafts took and did not keep is a's again, and b gives way.
    assert told(subject, subject.plan()) == "a[4:5] -b free=1"


def test_blocks_of_wrong_drafts_go_back_before_anybody_needs_one():
    subject = decoding("a", blocks=3)
    carry_out(subject, subject.with_drafts(subject.plan(), drafts_of(6)))
    assert subject.pool.free_count == 0
    subject.add(sequence("b", 2, arrival=1, priority=1))
    carry_out(subject, subject.plan())
    assert [len(each.block_ids) for each in subject.running] == [2]
    assert subject.pool.free_count == 1


@pytest.mark.parametrize(("right_count", "computed"), [(0, 4), (2, 6), (4, 8)])
def test_drafts_that_were_right_are_computed_and_the_others_are_computed_again(right_count, computed):
    subject = decoding("a")
    carry_out(subject, subject.with_drafts(subject.plan(), drafts_of(4)), right_count)
    assert told(subject, subject.plan()).startswith(f"a[{computed}:{computed + 1}] ")


def test_a_block_of_drafts_is_known_once_they_were_right():
    subject = reusing()
    subject.add(text("a", [1, 2, 3], most=12))
    carry_out(subject, subject.plan())
    for right_count, known_count in ((0, 1), (2, 1), (1, 2)):
        carry_out(subject, subject.with_drafts(subject.plan(), drafts_of(4)), right_count)
        assert subject.pool.known_count == known_count


def test_a_restarted_sequence_is_computed_from_its_beginning():
    subject = decoding("a", "b")
    subject.restart(subject.running[0])
    assert told(subject, subject.plan()) == "b[3:4] a[0:4] free=14"


def test_prompts_that_are_less_urgent_than_something_here_are_computed_in_pieces_smaller_beside_its_prompt():
    subject = batcher(blocks=400, running=6, budget=900)
    subject.add(sequence("batch", 500, priority=2))
    assert told(subject, subject.plan()).startswith("batch[0:500] ")
    subject.add(sequence("more", 200, arrival=1, priority=2))
    subject.add(sequence("urgent", 300, arrival=2, priority=0))
    plan = subject.plan()
    assert told(subject, plan).startswith("urgent[0:300] batch[0:32] ")
    carry_out(subject, plan)
    assert told(subject, subject.plan()).startswith("urgent[300:301] batch[32:160] ")
    subject.remove("urgent")
    assert told(subject, subject.plan()).startswith("batch[32:500] more[0:200] ")


def plan_of_decodes(subject: Batcher, *prompts: int) -> StepPlan:
    """The plan of a step in which sequences with such prompts all decode."""
    for index, prompt in enumerate(prompts):
        subject.add(sequence(chr(ord("a") + index), prompt, arrival=index))
    while subject.waiting or subject.decode_count < len(prompts):
        carry_out(subject, subject.plan())
    return subject.plan()


def told_after(subject: Batcher, plan: StepPlan, *ending: str) -> str | None:
    after = subject.plan_after(plan, lambda each: each.request_id in ending)
    return None if after is None else told(subject, after)


def test_the_step_after_decodes_is_their_next_tokens_with_the_blocks_for_them():
    subject = batcher()
    plan = plan_of_decodes(subject, 5, 6)
    assert told(subject, plan) == "a[6:7] b[6:7] free=12"
    assert told_after(subject, plan) == "a[7:8] b[7:8] free=12"
    carry_out(subject, plan)
    plan = subject.plan()
    assert told_after(subject, plan) == "a[8:9] b[8:9] free=10"
    carry_out(subject, plan)
    assert told(subject, subject.plan()) == "a[8:9] b[8:9] free=10"


def test_who_ends_with_a_step_has_no_part_in_the_one_after():
    subject = batcher()
    plan = plan_of_decodes(subject, 5, 6)
    assert told_after(subject, plan, "a") == "b[7:8] free=12"
    assert told_after(subject, plan, "a", "b") is None


def test_nothing_is_known_of_the_step_after_one_with_a_prompt():
    subject = batcher()
    plan_of_decodes(subject, 3)
    subject.add(sequence("long", 20, arrival=1))
    plan = subject.plan()
    assert told(subject, plan) == "a[3:4] long[0:7] free=10"
    assert told_after(subject, plan) is None


def test_who_could_be_admitted_is_not_left_out_of_the_step_after_and_who_could_not_holds_up_nobody():
    subject = batcher(running=2)
    plan = plan_of_decodes(subject, 3)
    subject.add(sequence("next", 3, arrival=1))
    assert told_after(subject, plan) is None
    subject = batcher(running=2)
    plan = plan_of_decodes(subject, 3, 3)
    subject.add(sequence("next", 3, arrival=2))
    assert told_after(subject, plan) == "a[4:5] b[4:5] free=12"
    subject.add(sequence("urgent", 3, arrival=3, priority=-1))
    assert told_after(subject, plan) is None


def test_the_step_after_takes_no_block_where_not_all_are_free():
    subject = batcher(blocks=5)
    plan = plan_of_decodes(subject, 6, 7)
    assert told(subject, plan) == "a[7:8] b[7:8] free=1"
    assert told_after(subject, plan) is None
    assert subject.pool.free_count == 1
    assert told_after(subject, plan, "a") == "b[8:9] free=0"


def test_nothing_is_known_of_the_step_after_with_a_window():
    subject = batcher(window=WINDOWS["four"])
    assert told_after(subject, plan_of_decodes(subject, 5)) is None
