"""What of a model each rank of a tensor-parallel group holds (Shoeybi et al., Megatron-LM, 2019).

Pure. Heads, the rows of feed-forward parts, the vocabulary and experts are cut into ranges, one a rank, as even
as they come; nothing needs to divide evenly. Where there are more ranks than KV heads, ranks share one and hold
a copy of it. Invariant: the ranges of all ranks together are the model, each part once but for such copies.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .architecture import Architecture
from .errors import ModelLoadError
from .layouts import Part


@dataclass(frozen=True)
class Division:
    """One rank's ranges."""

    rank: int
    size: int
    query_heads: range
    kv_heads: range
    experts: range
    vocabulary: range

    def is_here(self, part: Part) -> bool:
        """Whether the rank holds anything of a tensor."""
        return part.expert is None or part.expert in self.experts

    def span(self, part: Part) -> range | None:
        """The rows (or columns, as the part's cut says) that the rank holds; None is all."""
        cut = part.cut
        if cut is None or self.size == 1:
            return None
        unit_count = part.shape[cut.axis] // cut.unit
        units = {"query heads": self.query_heads, "kv heads": self.kv_heads}.get(cut.by)
        if units is None:
            units = _spread(unit_count, self.rank, self.size)
        return range(units.start * cut.unit, units.stop * cut.unit)

    def shape(self, part: Part) -> tuple[int, ...]:
        """A part's shape on this rank."""
        span = self.span(part)
        if span is None:
            return part.shape
        assert part.cut is not None
        return tuple(len(span) if axis == part.cut.axis else size for axis, size in enumerate(part.shape))

    def local(self, architecture: Architecture) -> Architecture:
        """The architecture with the rank's own heads; routers still know all experts."""
        return dataclasses.replace(architecture, head_count=len(self.query_heads), kv_head_count=len(self.kv_heads))


def division(path: Path, architecture: Architecture, rank: int, size: int) -> Division:
    """A rank's ranges; ModelLoadError where the model cannot be divided among so many."""
    a = architecture
    fewest = {
        "query heads": a.head_count,
        "tokens of the vocabulary": a.vocabulary_size,
        "columns of the feed-forward part": a.intermediate_size,
    }
    if a.latent is None and size > a.kv_head_count:
        # The ranks that share a KV head divide its query heads.
        most_at_one = -(-size // a.kv_head_count)
        if most_at_one > a.group_size:
            raise _too_many(path, size, f"{a.kv_head_count} KV heads with {a.group_size} query heads each")
    if a.experts is not None:
        fewest["experts"] = a.experts.count
    for name, count in fewest.items():
        if size > count:
            raise _too_many(path, size, f"{count} {name}")
    query_heads, kv_heads = _heads(a, rank, size)
    return Division(
        rank=rank,
        size=size,
        query_heads=query_heads,
        kv_heads=kv_heads,
        experts=_spread(0 if a.experts is None else a.experts.count, rank, size),
        vocabulary=_spread(a.vocabulary_size, rank, size),
    )


def _heads(a: Architecture, rank: int, size: int) -> tuple[range, range]:
    if a.latent is not None:
        return _spread(a.head_count, rank, size), range(1)
    if size <= a.kv_head_count:
        kv_heads = _spread(a.kv_head_count, rank, size)
        return range(kv_heads.start * a.group_size, kv_heads.stop * a.group_size), kv_heads
    sharing = [_spread(size, head, a.kv_head_count) for head in range(a.kv_head_count)]
    head = next(index for index, ranks in enumerate(sharing) if rank in ranks)
    own = _spread(a.group_size, rank - sharing[head].start, len(sharing[head]))
    first = head * a.group_size
    return range(first + own.start, first + own.stop), range(head, head + 1)


def _spread(count: int, index: int, parts: int) -> range:
    """The `index`-th of `parts` ranges of 0 to `count`, which differ by one at most."""
    return range(count * index // parts, count * (index + 1) // parts)


def _too_many(path: Path, size: int, what: str) -> ModelLoadError:
    return ModelLoadError(f"{path}: tensor_parallel_size is {size}, and {what} cannot be divided among so many ranks")
