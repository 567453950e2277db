"""The engine's load among Triton's own metrics."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils

from llm_engine import EngineLoad

_GAUGES = {
    "tidegate_engine_running_sequences": "Sequences that generate.",
    "tidegate_engine_waiting_sequences": "Sequences that wait for a place or for KV blocks.",
    "tidegate_engine_kv_cache_usage_ratio": "KV blocks in use, of all (0 to 1).",
}
_COUNTERS = {
    "tidegate_engine_steps_total": "Steps computed.",
    "tidegate_engine_preemptions_total": "Sequences that lost their KV blocks and were computed again.",
    "tidegate_engine_prompt_tokens_total": "Prompt tokens computed.",
    "tidegate_engine_cached_tokens_total": "Tokens of prompts whose keys and values were there already.",
    "tidegate_engine_generated_tokens_total": "Tokens generated.",
    "tidegate_engine_drafted_tokens_total": "Tokens drafted from a sequence's own text.",
    "tidegate_engine_accepted_tokens_total": "Drafted tokens that were the next ones.",
}


class LoadMetrics:
    """Shows an engine's load; each value costs a message to the server, so call it seldom."""

    def __init__(self, model_name: str) -> None:
        self._metrics = {}
        # Triton drops a family that nobody holds.
        self._families = []
        for descriptions, kind in ((_GAUGES, pb_utils.MetricFamily.GAUGE), (_COUNTERS, pb_utils.MetricFamily.COUNTER)):
            for name, description in descriptions.items():
                family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
                self._families.append(family)
                self._metrics[name] = family.Metric(labels={"model": model_name})
        self._shown: dict[str, float] = dict.fromkeys(self._metrics, 0.0)

    def show(self, load: EngineLoad) -> None:
        """Sets what has changed."""
        used = load.total_block_count - load.free_block_count
        values = {
            "tidegate_engine_running_sequences": load.running,
            "tidegate_engine_waiting_sequences": load.waiting,
            "tidegate_engine_kv_cache_usage_ratio": used / load.total_block_count,
            "tidegate_engine_steps_total": load.step_count,
            "tidegate_engine_preemptions_total": load.preemption_count,
            "tidegate_engine_prompt_tokens_total": load.prompt_token_total,
            "tidegate_engine_cached_tokens_total": load.cached_token_total,
            "tidegate_engine_generated_tokens_total": load.generated_token_total,
            "tidegate_engine_drafted_tokens_total": load.drafted_token_total,
            "tidegate_engine_accepted_tokens_total": load.accepted_token_total,
        }
        for name, value in values.items():
            change = value - self._shown[name]
            if change:
                metric = self._metrics[name]
                metric.increment(change) if name in _COUNTERS else metric.set(value)
                self._shown[name] = value
