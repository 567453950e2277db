"""Steps in which every sequence decodes, as CUDA graphs: a whole step is one launch.

Owns the graphs, one for each size of batch, and the memory of their inputs. A batch is filled up to the next size with
rows that attend to the padding block. Invariants: all graphs are made at the start, and share their memory; a step that
fits none is left to who asked.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .step_tensors import AttentionGroup, StepTensors

Replay = Callable[[], torch.Tensor]


def batch_sizes(most: int) -> list[int]:
    """For which there are graphs: powers of two, and from 32 on multiples of 32."""
    sizes = [size for size in (1, 2, 4, 8, 16) if size < most] + list(range(32, most, 32))
    return [*sizes, most]


class Capture:
    """Makes graphs of functions, one after the other; what a function reads stays where it is.

    Graphs share their memory: what one gave holds until any of them is replayed.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Replay) -> Replay:
        """The function as a graph."""
        # Kernels are compiled and memory is found before.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True)
class _Graph:
    step: StepTensors
    replay: Replay


class GraphedDecodes:
    """Runs the steps that fit.

    Args:
        run: computes a step; its logits are [sampled_count, vocabulary].
        most_sequences: the largest batch.
        most_tokens: the longest context.
        padding_block: what rows that fill up attend to.
        capture: makes a graph of a function.
    """

    def __init__(
        self,
        run: Callable[[StepTensors], torch.Tensor],
        *,
        most_sequences: int,
        most_tokens: int,
        block_token_count: int,
        padding_block: int,
        device: torch.device,
        capture: Callable[[Replay], Replay],
    ) -> None:
        self._run, self._capture, self._device = run, capture, device
        self._sizes = batch_sizes(most_sequences)
        self._most_tokens, self._block_token_count = most_tokens, block_token_count
        self._padding_block = padding_block
        # The largest first: what it needs is room for all others.
        self._graphs = {size: self._made(size) for size in reversed(self._sizes)}

    def __call__(self, step: StepTensors) -> torch.Tensor | None:
        """A step's logits; None for one that does not fit."""
        if len(step.groups) != 1 or step.groups[0].lengths is None:
            return None
        group, count = step.groups[0], len(step.token_ids)
        size = next((size for size in self._sizes if size >= count), None)
        if size is None or len(step.sample_rows) != count:
            return None
        graph = self._graphs[size]
        own, own_group = graph.step, graph.step.groups[0]
        assert own_group.lengths is not None
        self._fill(own.token_ids, step.token_ids, 0)
        self._fill(own.positions, step.positions, 0)
        self._fill(own.slots, step.slots, self._padding_block * self._block_token_count)
        self._fill(own_group.lengths, group.lengths, 1)
        own_group.blocks[:, 0].fill_(self._padding_block)
        own_group.blocks[:count, : group.blocks.shape[1]].copy_(group.blocks)
        return graph.replay().index_select(0, step.sample_rows)

    def _made(self, size: int) -> _Graph:
        blocks = -(-self._most_tokens // self._block_token_count)

        def numbers(*shape: int, of: int = 0) -> torch.Tensor:
            return torch.full(shape, of, dtype=torch.int64, device=self._device)

        group = AttentionGroup(
            first_row=0,
            sequence_count=size,
            query_count=1,
            blocks=numbers(size, blocks, of=self._padding_block),
            longest=self._most_tokens,
            lengths=numbers(size, of=1),
        )
        step = StepTensors(
            works=[],
            token_ids=numbers(size),
            positions=numbers(size),
            slots=numbers(size, of=self._padding_block * self._block_token_count),
            groups=[group],
            sample_rows=torch.arange(size, device=self._device),
            sampled=list(range(size)),
        )
        return _Graph(step, self._capture(lambda: self._run(step)))

    @staticmethod
    def _fill(own: torch.Tensor, given: torch.Tensor, rest: int) -> None:
        own[: len(given)].copy_(given)
        own[len(given) :].fill_(rest)
