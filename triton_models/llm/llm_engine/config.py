"""Every setting of the engine, with its unit, its bound and the reason for it.

Invariants: a config that exists is valid; it never changes. What follows from it and from the model
together (how many blocks there are, which type the products run in) is not kept here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

DTYPES = ("bf16", "fp16", "fp32", "int8", "w8a8")
ROUNDED_DTYPES = ("int8", "w8a8")
"""With which matrices are rounded to eight bits."""
NARROW_DTYPES = ("bf16", "w8a8")
"""With which a CPU may round the rows that are multiplied."""
DEVICES = ("cpu", "cuda")

_MOST_STRETCH = 1000.0
_MOST_SECONDS = 86_400.0


def _bounded(default: Any, least: int, most: int) -> Any:
    """An integer, and what it may be."""
    return field(default=default, metadata={"bounds": (least, most)})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The settings of one engine; ValueError names everything that is wrong, at once."""

    model_path: str
    """A GGUF file, or a Hugging Face folder (config.json and *.safetensors)."""
    cache_dir: str | None = None
    """Where the dequantised weights of a GGUF file are kept between starts; None keeps nothing."""
    dtype: str = "fp32"
    """The type the weights are held in. In fp32 an answer depends so little on what else is in the batch that a greedy
    one goes on identically on another replica; bf16 halves the memory and is what a GPU wants. int8 rounds matrices
    to eight bits, 32 weights to a scale, and w8a8 what they are multiplied with as well, on a CPU with AVX2 and no
    matrix unit. What a GGUF file has in blocks of four or eight bits stays as it is. With bf16 and w8a8 a CPU computes
    in bf16 where it has such products, else in fp32 beside the weights in blocks; keys and values are bf16 wherever the
    kernels' products are narrow."""
    device: str = "cpu"
    max_sequences: int = _bounded(32, 1, 4096)
    """Sequences that run at once; each costs one token of every step's budget."""
    max_waiting: int = _bounded(64, 0, 1_000_000)
    """Sequences held beyond `max_sequences`; past this, `add` refuses."""
    max_context_tokens: int | None = _bounded(None, 2, 1 << 24)
    """Prompt and output together, in tokens; None takes the model's own bound."""
    kv_cache_bytes: int = _bounded(512 * 1024 * 1024, 1, 1 << 44)
    """The bound on all KV blocks together, in bytes, allocated at start."""
    block_token_count: int = _bounded(16, 1, 1024)
    """Tokens in a KV block: small wastes little at a sequence's end, large gathers quicker."""
    step_token_budget: int = _bounded(128, 1, 1 << 20)
    """Tokens computed in one step; it bounds how long a prompt can stall the running decodes. The default suits a
    CPU, where a step of 128 tokens takes a few tenths of a second; a GPU fills up at 2,048 and more."""
    step_stretch: float = 1.5
    """How many times as long as the decodes alone of a wide batch a step with prompts may take, so that running answers
    keep their pace while long prompts arrive; half of `max_sequences` and more is wide. 0 leaves it to
    `step_token_budget`, as it is until such a batch was seen."""
    speculation_tokens: int = _bounded(4, 0, 64)
    """Drafts a step and sequence at most: what followed where its newest tokens stood before in its own text is
    computed beside them, and kept where it comes out again. Answers are the same as with 0, which drafts nothing."""
    speculation_sequences: int = _bounded(2, 1, 4096)
    """Drafts are made while at most so many sequences run: a wide batch has rows enough."""
    thread_count: int = _bounded(1, 1, 1024)
    """Threads that torch uses in a rank's process; it is set for the whole process."""
    prefix_reuse: bool = True
    """Prompts that begin alike, of the same `cache_salt`, share the keys and values of whole blocks; what nobody uses
    any more is kept until its place is wanted."""
    attention_window: int = _bounded(0, 0, 1 << 24)
    """How many of the newest tokens a token far into a text sees, itself included, beside the first ones; 0: all. It
    bounds the time and the blocks of long texts, and what lies before is forgotten."""
    attention_window_from: int = _bounded(4096, 1, 1 << 24)
    """The first position whose token sees no more than that; a text that is shorter is computed as without."""
    attention_sinks: int = _bounded(16, 0, 1 << 16)
    """First tokens that every token sees: models rest what they do not use of their attention on them, and without
    them fall apart."""
    cpu_kernels: bool = True
    """On a CPU: compute by kernels that are built at the first start with the machine's C compiler, several times
    quicker for a few sequences. Without a compiler torch computes, as it does where this is off."""
    tensor_parallel_size: int = _bounded(1, 1, 1024)
    """Ranks that a model is divided among, each a process (and on CUDA a device). `kv_cache_bytes` and `thread_count`
    are each rank's own."""
    node_count: int = _bounded(1, 1, 1024)
    """Hosts among which the ranks are divided evenly. These four are torchrun's nnodes, node_rank, master_addr and
    master_port."""
    node_rank: int = _bounded(0, 0, 1023)
    """Which of them this host is; node 0 has the engine, the others join it."""
    master_address: str = "127.0.0.1"
    """Node 0's address, on which it listens and where the others find it; of one node nothing listens."""
    master_port: int = _bounded(0, 0, 65535)
    """Node 0's port; with several nodes it must be given."""
    join_timeout_seconds: float = 300.0
    """How long nodes wait for each other before they load; after it the load fails."""
    collective_timeout_seconds: float = 60.0
    """How far ranks may be apart within a step; a rank that hangs is given up after it."""

    @property
    def own_ranks(self) -> range:
        """The ranks of this node."""
        count = self.tensor_parallel_size // self.node_count
        return range(self.node_rank * count, (self.node_rank + 1) * count)

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("engine settings: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        if not self.model_path:
            yield "model_path is empty"
        if self.dtype not in DTYPES:
            yield f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}"
        if self.device not in DEVICES:
            yield f"device is {self.device!r}, expected one of {', '.join(DEVICES)}"
        for each in fields(self):
            value = getattr(self, each.name)
            if not each.metadata or (value is None and each.default is None):
                continue
            least, most = each.metadata["bounds"]
            if type(value) is not int or not least <= value <= most:
                yield f"{each.name} is {value!r}, expected an integer from {least} to {most}"
        for name in ("join_timeout_seconds", "collective_timeout_seconds"):
            value = getattr(self, name)
            if not 0 < value <= _MOST_SECONDS:
                yield f"{name} is {value!r}, expected more than 0, to {_MOST_SECONDS:g}"
        yield from self._node_problems()
        if not (self.step_stretch == 0 or 1 < self.step_stretch <= _MOST_STRETCH):
            yield f"step_stretch is {self.step_stretch!r}, expected 0 (no bound), or more than 1, to {_MOST_STRETCH:g}"
        if self.attention_window and not self._window_fits():
            yield (
                f"attention_window_from is {self.attention_window_from}, expected at least attention_window and"
                f" attention_sinks together ({self.attention_window} + {self.attention_sinks})"
            )
        if not self._budget_holds_every_decode():
            yield (
                f"step_token_budget is {self.step_token_budget}, expected at least max_sequences"
                f" ({self.max_sequences}), so that no running sequence misses a step"
            )

    def _node_problems(self) -> Iterator[str]:
        counts = (self.node_count, self.node_rank, self.tensor_parallel_size)
        if not all(type(count) is int for count in counts) or self.node_count < 1:
            return
        if self.node_rank >= self.node_count:
            yield f"node_rank is {self.node_rank}, expected less than node_count ({self.node_count})"
        if self.tensor_parallel_size % self.node_count:
            yield (
                f"tensor_parallel_size is {self.tensor_parallel_size}, expected a multiple of node_count"
                f" ({self.node_count}), so that all nodes have as many ranks"
            )
        if self.node_count > 1 and self.master_port == 0:
            yield f"master_port is 0, expected the port on which node 0 listens, as node_count is {self.node_count}"
        if self.node_count > 1 and not self.master_address:
            yield "master_address is empty, expected node 0's"

    def _budget_holds_every_decode(self) -> bool:
        both = (self.step_token_budget, self.max_sequences)
        return not all(type(value) is int for value in both) or both[0] >= both[1]

    def _window_fits(self) -> bool:
        three = (self.attention_window_from, self.attention_window, self.attention_sinks)
        return not all(type(value) is int for value in three) or three[0] >= three[1] + three[2]
