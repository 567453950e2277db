"""What goes into the engine and what comes out of it: plain data, no behaviour.

Owns the public messages. It leaves their validation to `engine.py`, which knows the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

GRAMMAR_KINDS = ("lark", "regex")
"""What a grammar may be written in: Lark's notation as llguidance has it, or a regular expression of Rust's."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen from the model's distribution."""

    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it. 0 to 100."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities reach this sum; 1 keeps all."""
    min_p: float = 0.0
    """Keep the tokens that are at least so many times as likely as the likeliest; 0 keeps all. 0 to 1."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else runs; None lets the engine draw one."""
    repetition_penalty: float = 1.0
    """Over 1 makes every token of prompt and output less likely (Keskar et al., 2019)."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that it stands in the output. -2 to 2."""
    presence_penalty: float = 0.0
    """Taken once from the logit of each token that stands in the output. -2 to 2."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to these tokens' logits, before the penalties; a greedy choice sees it too. 1,024 at most, -100 to 100."""
    json_schema: str = ""
    """The output is JSON that this JSON Schema, an object of 16,384 bytes at most, describes; empty: any text."""
    grammar: str = ""
    """The whole output is what this grammar, of 16,384 bytes at most, describes; empty: any text. Not together with
    `json_schema`."""
    grammar_kind: str = ""
    """What `grammar` is written in, one of GRAMMAR_KINDS; empty where there is none."""
    logprobs: int | None = None
    """None: no log-probabilities; 0 to 20: the chosen token's, and so many of the likeliest."""

    @property
    def has_penalty(self) -> bool:
        """Whether what was said before changes the logits."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def is_truncated(self) -> bool:
        """Whether tokens beyond the likeliest are cut off."""
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def has_grammar(self) -> bool:
        """Whether the output may not be any text."""
        return bool(self.json_schema or self.grammar)


@dataclass(frozen=True, kw_only=True)
class SequenceRequest:
    """One prompt to continue."""

    request_id: str
    token_ids: Sequence[int]
    """The prompt, and after it the output made so far: a list or an int32 array."""
    prior_output_count: int = 0
    """How many tokens at the end of `token_ids` are output already sent (a resumed request)."""
    max_tokens: int
    """The bound on output tokens, those already sent included."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output, and are not part of it; empty means the model's own."""
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever comes, for measurements; no token stops the output then."""
    cache_salt: str = ""
    """Whose request it is: keys and values are reused only among requests with the same one."""
    priority: int = 0
    """Lower is more urgent; equal priorities go by arrival."""


@dataclass(frozen=True, kw_only=True)
class SequenceOutput:
    """What one step gave one sequence."""

    request_id: str
    token_ids: list[int]
    """The new tokens, without the one that stopped the output."""
    logprobs: list[float] | None = None
    """Of each new token, under the model's own distribution, before bias, penalties and temperature."""
    top_token_ids: list[list[int]] | None = None
    top_logprobs: list[list[float]] | None = None
    finish_reason: str = ""
    """Empty while it runs; then "stop", "length" or "error". Nothing follows a finished output."""
    error_reason: str = ""
    """One of `errors.SEQUENCE_ERROR_REASONS` where `finish_reason` is "error"."""
    error_message: str = ""
    prompt_token_count: int = 0
    output_token_count: int = 0
    """All output so far, that of an earlier run of a resumed request included."""
    cached_token_count: int = 0
    """Tokens, first of the prompt, whose keys and values were there already when it was admitted."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the loaded model is, for whoever serves it."""

    name: str
    architecture: str
    vocabulary_size: int
    context_token_count: int
    """Prompt and output together: the least of the model's, the settings' and the KV blocks'."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    layer_count: int
    hidden_size: int
    head_count: int
    kv_head_count: int
    parameter_count: int
    weight_dtype: str
    compute_dtype: str
    """Of products that the kernels leave to torch: fp32 for bf16 weights where the CPU has no bf16 products."""
    cache_dtype: str
    """Of KV blocks."""
    device: str


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """How full the engine is, and what it has done since it started."""

    running: int
    waiting: int
    max_sequences: int
    max_waiting: int
    free_block_count: int
    total_block_count: int
    block_token_count: int
    step_count: int
    preemption_count: int
    prompt_token_total: int
    """Prompt tokens computed, counted again when a preempted sequence is recomputed."""
    generated_token_total: int
    step_seconds_last: float
    step_token_count_last: int
    drafted_token_total: int = 0
    accepted_token_total: int = 0
    """Drafted tokens that turned out to be the next ones."""
    cached_token_total: int = 0
    """Tokens whose keys and values were there already when their sequences were first admitted."""
    reuses_prefixes: bool = False
    known_block_count: int = 0
    """Blocks that another prompt could begin with, in use or free."""
