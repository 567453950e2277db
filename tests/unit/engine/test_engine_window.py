"""What rows see far into a long context: all paths against torch, and what is given back."""

import dataclasses

import pytest
import torch

from llm_engine import EngineConfig, SamplingParams, SequenceRequest
from llm_engine.architecture import Architecture
from llm_engine.cpu_kernels import load_kernels
from llm_engine.kv_cache import KvCache
from llm_engine.matmul import Compute
from llm_engine.scoring import log_probabilities
from llm_engine.step_tensors import RowWork, StepLayout, step_tensors
from llm_engine.window import FULL, Window

HEADS, KV_HEADS, SIZE, BLOCK, BLOCK_COUNT = 6, 2, 32, 16, 80
WINDOWS = {
    "sinks": Window(newest=70, begins_at=200, sinks=16),
    "sinks that fill no block": Window(newest=33, begins_at=64, sinks=5),
    "sinks of several blocks": Window(newest=300, begins_at=333, sinks=33),
    "no sinks": Window(newest=64, begins_at=64, sinks=0),
    "itself alone": Window(newest=1, begins_at=1, sinks=0),
}
ARCHITECTURE = Architecture(
    family="llama",
    name="random",
    layer_count=1,
    hidden_size=HEADS * SIZE,
    intermediate_size=32,
    head_count=HEADS,
    kv_head_count=KV_HEADS,
    head_dim=SIZE,
    vocabulary_size=8,
    context_token_count=4096,
    rope_base=1e4,
    rope_scaling=None,
    norm_epsilon=1e-5,
    eos_token_ids=(),
    bos_token_id=None,
)


@pytest.fixture(scope="module")
def kernels():
    loaded = load_kernels(None, 2)
    assert loaded is not None
    return loaded


def test_a_row_sees_the_first_tokens_and_the_newest():
    window = Window(newest=4, begins_at=8, sinks=2)
    seen = [sorted(set(range(position + 1)) - set(window.hidden(position))) for position in (0, 7, 8, 20)]
    assert seen == [[0], [*range(8)], [0, 1, 5, 6, 7, 8], [0, 1, 17, 18, 19, 20]]
    assert [window.seen_count(position) for position in (0, 7, 8, 20)] == [1, 8, 6, 6]
    assert list(window.hidden_blocks(20, 4)) == [1, 2, 3]
    assert not window.hidden_blocks(7, 4)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_what_is_hidden_stays_hidden(window):
    for position in range(900):
        assert set(window.hidden(position)) <= set(window.hidden(position + 1))
        for block in window.hidden_blocks(position, BLOCK):
            assert set(range(block * BLOCK, (block + 1) * BLOCK)) <= set(window.hidden(position))


class Texts:
    """Keys and values of some sequences in a cache, and what a plain attention makes of them."""

    def __init__(self, dtype: torch.dtype, kernels, window: Window, lengths: list[int]) -> None:
        device = torch.device("cpu")
        compute = Compute(
            device=device, dtype=dtype, activations=torch.float32, cached=dtype, kernels=kernels, attention=kernels
        )
        self.cache = KvCache(
            ARCHITECTURE, block_count=BLOCK_COUNT, block_token_count=BLOCK, compute=compute, window=window
        )
        self._window, self._lengths = window, lengths
        self._layout = StepLayout(
            block_token_count=BLOCK,
            padding_block=BLOCK_COUNT,
            group_size=HEADS // KV_HEADS,
            group_token_bound=1000,
            reads_blocks=self.cache.reads_blocks,
            reads_chunks=self.cache.reads_chunks,
            window=window,
            dtype=dtype,
            device=device,
        )
        generator = torch.Generator().manual_seed(3)
        counts = [-(-length // BLOCK) for length in lengths]
        self._blocks = torch.randperm(BLOCK_COUNT, generator=generator)[: sum(counts)].split(counts)
        self._queries = [torch.randn(length, HEADS, SIZE, generator=generator) * 2 for length in lengths]
        self._kept = [torch.randn(n, 2, KV_HEADS, SIZE, generator=generator).to(dtype) for n in lengths]
        for blocks, kept in zip(self._blocks, self._kept, strict=True):
            places = torch.arange(len(kept))
            self.cache.write(0, blocks[places // BLOCK] * BLOCK + places % BLOCK, kept.flatten(1))

    def work(self, number: int, start: int, count: int) -> RowWork:
        blocks = self._blocks[number].tolist()
        hidden = self._window.hidden_blocks(start, BLOCK)
        held = blocks[: hidden.start] + blocks[hidden.stop :]
        return RowWork(start=start, token_ids=[number] * count, block_ids=held, sample_count=0)

    def attend(self, *works: RowWork) -> torch.Tensor:
        """By the engine, in the order of the works, of which decodes stand first and by what they see."""
        step = step_tensors(list(works), self._layout)
        rows = zip(step.token_ids.tolist(), step.positions.tolist(), strict=True)
        queries = torch.stack([self._queries[number][position] for number, position in rows])
        out = self.cache.room(*queries.shape[:2])
        before = self.cache.layer(0).clone()
        for work in works:
            # What was given back is another's.
            hidden = self._window.hidden_blocks(work.start, BLOCK)
            self.cache.layer(0)[self._blocks[work.token_ids[0]][hidden.start : hidden.stop]] = float("nan")
        for group in step.groups:
            self.cache.attend(0, queries, group, out)
        self.cache.layer(0).copy_(before)
        rows = enumerate(zip(step.token_ids.tolist(), step.positions.tolist(), strict=True))
        found = {place: row for row, place in rows}
        order = [found[(w.token_ids[0], w.start + index)] for w in works for index in range(w.count)]
        return out[order].clone()

    def expected(self, number: int, start: int, count: int) -> torch.Tensor:
        keys, values = self._kept[number].float().repeat_interleave(HEADS // KV_HEADS, dim=2).unbind(1)
        scores = torch.einsum("rhd,thd->hrt", self._queries[number][start : start + count], keys) * SIZE**-0.5
        hidden = torch.arange(len(keys)) > torch.arange(start, start + count)[:, None]
        for row in range(count):
            far = self._window.hidden(start + row)
            hidden[row, far.start : far.stop] = True
        return torch.einsum("hrt,thd->rhd", scores.masked_fill(hidden, float("-inf")).softmax(2), values)


def assert_close(found: torch.Tensor, expected: torch.Tensor, is_narrow: bool) -> None:
    assert (found - expected).norm() < (8e-3 if is_narrow else 1e-5) * expected.norm()
    assert (found - expected).abs().max() < (0.05 if is_narrow else 1e-5)


LENGTHS = [600, 30, 340, 1]


@pytest.mark.parametrize("window", [*WINDOWS.values(), FULL], ids=[*WINDOWS, "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_kernels", [False, True])
def test_decodes_see_what_the_window_shows(kernels, window, dtype, has_kernels):
    texts = Texts(dtype, kernels if has_kernels else None, window, LENGTHS)
    assert texts.cache.reads_blocks == has_kernels
    works = [texts.work(number, length - 1, 1) for number, length in enumerate(LENGTHS)]
    found = texts.attend(*works)
    expected = torch.cat([texts.expected(number, length - 1, 1) for number, length in enumerate(LENGTHS)])
    assert_close(found, expected, is_narrow=dtype == torch.bfloat16 and not has_kernels)
    if has_kernels:
        assert torch.equal(torch.cat([texts.attend(work) for work in works]), found)


@pytest.mark.parametrize("window", [*WINDOWS.values(), FULL], ids=[*WINDOWS, "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize(("start", "count"), [(0, 400), (190, 20), (331, 4), (450, 150)])
def test_prompts_see_what_the_window_shows_however_they_are_cut(kernels, window, dtype, has_kernels, start, count):
    texts = Texts(dtype, kernels if has_kernels else None, window, LENGTHS)
    found = texts.attend(texts.work(0, start, count), texts.work(2, 250, 1))
    # By the kernels it is narrow, too, or they leave it to torch.
    assert_close(found[:count], texts.expected(0, start, count), is_narrow=dtype == torch.bfloat16)
    if texts.cache.reads_chunks and count > 3:
        for cut in (2, count // 3 + 1):
            parts = [texts.attend(texts.work(0, *part)) for part in ((start, cut), (start + cut, count - cut))]
            assert torch.equal(torch.cat(parts), found[:count])


SMALL = {"attention_window": 9, "attention_window_from": 24, "attention_sinks": 3}


def finish(engine, *requests: SequenceRequest) -> tuple[dict[str, list[int]], int]:
    """What each got, and the most blocks that were taken at once."""
    tokens: dict[str, list[int]] = {}
    most = 0
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        most = max(most, engine.load.total_block_count - engine.load.free_block_count)
    return tokens, most


def request(name: str, tokens: list[int], count: int) -> SequenceRequest:
    sampling = SamplingParams(temperature=0.0)
    return SequenceRequest(request_id=name, token_ids=tokens, max_tokens=count, sampling=sampling, ignore_eos=True)


def test_a_text_shorter_than_the_windows_beginning_is_computed_as_without(make_engine):
    text = [index * 7 % 96 for index in range(100)]
    full = log_probabilities(make_engine(), text)
    windowed = log_probabilities(make_engine(**SMALL), text)
    assert windowed[:24] == full[:24]
    assert windowed[24:] != full[24:]
    assert log_probabilities(make_engine(**SMALL | {"attention_window_from": 120}), text) == full


@pytest.mark.parametrize("prefix_reuse", [False, True])
def test_a_long_generation_runs_in_a_pool_that_could_not_hold_it(make_engine, prefix_reuse):
    roomy = make_engine(**SMALL)
    expected, most = finish(roomy, request("a", [5, 6, 7], 120))
    assert most < 12, "124 tokens fill 31 blocks"
    # A block of 4 tokens takes 1,024 bytes; one is for padding.
    tight = make_engine(**SMALL, kv_cache_bytes=15 * 1024, step_token_budget=8, prefix_reuse=prefix_reuse)
    assert tight.model_info.context_token_count == 128 > 4 * tight.load.total_block_count
    assert finish(tight, request("a", [5, 6, 7], 120)) == (expected, most)
    # And a prompt of that length, which comes in pieces.
    whole = [5, 6, 7, *expected["a"]]
    again, most = finish(tight, request("b", whole[:100], 10))
    assert again["b"] == whole[100:110]
    assert most <= tight.load.total_block_count


def test_sequences_that_preempt_each_other_get_what_they_get_alone(make_engine):
    requests = [request(str(index), [index + 3] * (index + 1), 100) for index in range(4)]
    alone = {}
    for each in requests:
        alone |= finish(make_engine(**SMALL), each)[0]
    tight = make_engine(**SMALL, kv_cache_bytes=19 * 1024, step_token_budget=8)
    together, _ = finish(tight, *(dataclasses.replace(each, priority=int(each.request_id)) for each in requests))
    assert tight.load.preemption_count > 0
    assert together == alone


def test_without_a_window_the_context_is_bounded_by_the_pool(make_engine):
    assert make_engine(kv_cache_bytes=15 * 1024).model_info.context_token_count == 14 * 4


def test_a_window_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"attention_window_from is 100, expected at least .* together \(90 \+ 16\)"):
        EngineConfig(model_path="x", attention_window=90, attention_window_from=100)
    with pytest.raises(ValueError, match="attention_window is -1"):
        EngineConfig(model_path="x", attention_window=-1)
    assert EngineConfig(model_path="x", attention_window_from=1).attention_window == 0
