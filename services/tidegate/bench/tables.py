"""Summaries as rows of text: for the terminal and for the page. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tidegate.bench.summary import Summary

Row = tuple[str, list[str]]


def summary_rows(summaries: Sequence[Summary]) -> list[Row]:
    """What is compared first, a row each: its name, and a text a run."""
    rows: list[tuple[str, Callable[[Summary], str]]] = [
        ("offered", lambda each: f"{each.all.offered:.1f}/s"),
        ("goodput", lambda each: f"{each.all.goodput:.1f}/s"),
        ("in time, of all", lambda each: f"{each.all.goodput_share:.1%}"),
        ("tokens/s of answers in time", lambda each: f"{each.all.tokens_per_second:.0f}"),
        ("TTFT p50", lambda each: time(each.all.ttft["p50"])),
        ("TTFT p99", lambda each: time(each.all.ttft["p99"])),
        ("TPOT p50", lambda each: time(each.all.tpot["p50"])),
        ("TPOT p99", lambda each: time(each.all.tpot["p99"])),
        ("latency p99", lambda each: time(each.all.latency["p99"])),
        ("refused", lambda each: _count(each, "refused")),
        ("refusal took, p99", lambda each: time(each.refusal["p99"])),
        ("late or deadline exceeded", lambda each: _count(each, "late", "deadline_exceeded")),
        ("failed or wrong", lambda each: _count(each, "failed", "wrong_text")),
        ("client left", lambda each: _count(each, "left")),
        ("attempts per request", lambda each: f"{each.attempts / max(1, each.all.requests):.2f}"),
        ("wasted tokens", lambda each: f"{each.wasted_token_share:.1%}"),
        ("Jain index of tokens, lowest of 10 s", lambda each: f"{each.jain_tokens_low:.3f}"),
        ("generator behind its plan, p99", lambda each: time(each.lag["p99"])),
        ("generator's CPU per request", lambda each: f"{1000 * each.cpu_seconds_per_request:.2f} ms"),
    ]
    return [(name, [text(each) for each in summaries]) for name, text in rows]


def split_rows(summary: Summary) -> list[Row]:
    """Classes, tenants and flows of a run, where there is more than one: requests, in time, tokens/s, TTFT p50, p99."""
    rows = []
    for kind, parts in (("class", summary.classes), ("tenant", summary.tenants), ("flow", summary.flows)):
        if len(parts) < 2:
            continue
        for name, part in parts.items():
            figures = [str(part.requests), f"{part.goodput_share:.1%}", f"{part.tokens_per_second:.0f}"]
            rows.append((f"{kind} {name}", [*figures, time(part.ttft["p50"]), time(part.ttft["p99"])]))
    return rows


SPLIT_HEAD = ("", "requests", "in time", "tokens/s in time", "TTFT p50", "TTFT p99")


def time(seconds: float) -> str:
    """A time with a unit that suits it."""
    if math.isnan(seconds):
        return "–"
    if seconds < 0.0995:
        return f"{1000 * seconds:.1f} ms"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _count(summary: Summary, *outcomes: str) -> str:
    count = sum(summary.all.outcomes.get(outcome, 0) for outcome in outcomes)
    share = count / summary.all.requests if summary.all.requests else 0.0
    return f"{count} ({share:.1%})" if count else "0"
