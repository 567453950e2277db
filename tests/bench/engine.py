"""Measures the engine alone and against its peers, each figure beside its bound: `make bench SCENARIO=engine`.

All but the part `gpu` run on the CPU of one machine in one run, in turn: the same model (SmolLM2-135M-Instruct, Q4_1),
the same prompts as token ids, the same threads, greedy, each once warmed up. Our engine is measured in every type that
it has, and the quickest counts; the default's figure stands beside it. Exit status 1 if a row does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

import engine_gpu
import structlog
from engine_peers import (
    BATCHING_PEERS,
    LLAMA_CPP,
    NATIVE_LLAMA_CPP,
    PEER_MODELS,
    TRANSFORMERS,
    Peer,
    hugging_face_folder,
    peer_bench,
)
from engine_runs import CACHE_FOLDER, ENGINE_FOLDER, Case, RunFailed, own_bench, own_inside, triton_python
from engine_triton import TritonDidNotStart, running_triton, tokens_per_second
from table import Table

from tidegate.cli.config import default_model_path
from tidegate.text.model_files import load_text_model

# The engine's settings are read where they stand; that part of it imports no torch.
sys.path.insert(0, str(ENGINE_FOLDER))
from llm_engine.config import DTYPES, EngineConfig

PEER_NAMES: Final = [peer.name for peer in (LLAMA_CPP, NATIVE_LLAMA_CPP, *BATCHING_PEERS)]
PROMPT_TOKENS: Final = 64
ANSWER_TOKENS: Final = 128
STREAMS: Final = 32
PREFILL_TOKENS: Final = 1024
LONG_TEXT_TOKENS: Final = 8_000
WINDOW: Final = 512
DRAFT_PASSAGE_TOKENS: Final = 120
TEXT_FILE: Final = Path(__file__).resolve().parent / "engine_text.txt"
PLAIN_DTYPE: Final = "bf16"
"""What the share of the machine and the memory are told of, and what others lose is told against."""

MOST_PERPLEXITY, LEAST_AGREEMENT = 1.05, 90.0
"""Against that, as a ratio and in per cent: what rounding to eight bits may cost, and nothing else costs more."""

DECODE_ONE: Final = Case("decode, one sequence", 1, PROMPT_TOKENS, ANSWER_TOKENS, "decode_tokens_per_second")
DECODE_MANY: Final = Case(
    f"decode, {STREAMS} sequences", STREAMS, PROMPT_TOKENS, ANSWER_TOKENS, "decode_tokens_per_second"
)
PREFILL: Final = Case(
    f"prefill, {PREFILL_TOKENS} tokens", 1, PREFILL_TOKENS, 2, "prompt_tokens_per_second",
    {"step-token-budget": PREFILL_TOKENS},
)  # fmt: skip


Figures = dict[str, tuple[float, str]]
"""Of peers, by name: the figure, and all about it in words."""


class Bench:
    """What is measured once and read by several rows."""

    def __init__(self, arguments: argparse.Namespace, table: Table, folder: Path) -> None:
        self.table = table
        self.folder = folder
        self.rounds: int = arguments.rounds
        self.threads: int = arguments.threads
        self.model: str = arguments.model
        self.churn_seconds: float = arguments.churn_seconds
        self.dtypes: Sequence[str] = arguments.dtype or all_dtypes()
        self.default_dtype = default_dtype()
        self.peers: Path | None = arguments.peers
        self._own: dict[str, dict[str, float]] = {}

    def token_ids(self, words: str) -> list[int]:
        """A text as the model's tokens."""
        return load_text_model(self.model, "engine").tokenizer.encode(words, allow_special=False)

    def own(self, case: Case) -> dict[str, float]:
        """Our figure by type."""
        if case.name not in self._own:
            self.figures(case, ())
        return self._own[case.name]

    def best_dtype(self, case: Case) -> str:
        """The type with the highest figure."""
        own = self.own(case)
        return max(own, key=lambda dtype: own[dtype])

    def figures(self, case: Case, peers: Sequence[Peer]) -> Figures:
        """The peers' figures by name, with what they say of themselves; ours are kept beside. All take turns."""
        prompts = case.prompts_file(self.folder)
        own: dict[str, list[float]] = {dtype: [] for dtype in self.dtypes}
        found: dict[str, list[dict[str, Any]]] = {}
        installed = {peer: python for peer in peers if (python := peer.python(self.peers)) is not None}
        for peer in peers:
            if peer not in installed:
                self.table.note(peer.not_installed(self.peers))
        for _ in range(self.rounds):
            for dtype in self.dtypes:
                result = own_bench(case, prompts, model=self.model, dtype=dtype, threads=self.threads)
                own[dtype].append(float(result[case.figure]))
            for peer, python in list(installed.items()):
                try:
                    result = peer_bench(
                        peer, python, case, prompts, model=self.model, folder=PEER_MODELS, threads=self.threads
                    )
                except RunFailed as failure:
                    self.table.note(f"{peer.name}: does not run: {failure}")
                    del installed[peer]
                else:
                    found.setdefault(peer.name, []).append(result)
        self._own[case.name] = {dtype: statistics.median(values) for dtype, values in own.items()}
        return {name: _of_peer(name, results, case) for name, results in found.items()}

    def words(self, case: Case) -> str:
        """Our figures in words, the one that counts first."""
        own, best = self.own(case), self.best_dtype(case)
        others = [f"{dtype} {own[dtype]:.0f}" for dtype in own if dtype != best]
        marked = [f"default {word}" if word.split()[0] == self.default_dtype else word for word in others]
        return f"{own[best]:.0f} tokens/s in {best}" + (f" ({', '.join(marked)})" if marked else "")


def decode_one(bench: Bench) -> None:
    """One sequence against llama.cpp."""
    peers = bench.figures(DECODE_ONE, (LLAMA_CPP, NATIVE_LLAMA_CPP))
    _against_llama_cpp(bench, DECODE_ONE, "llama.cpp", peers, bound=1.0, aim=1.3)


def decode_many(bench: Bench) -> None:
    """Many sequences against llama.cpp's server, and against the best of those that batch."""
    peers = bench.figures(DECODE_MANY, (LLAMA_CPP, NATIVE_LLAMA_CPP, *BATCHING_PEERS))
    others = _of(peers, *BATCHING_PEERS)
    _against_llama_cpp(bench, DECODE_MANY, f"llama.cpp's server, {STREAMS} slots", peers, bound=3.0, aim=4.0)
    _compare(bench, DECODE_MANY, "the best of those that batch", others, bound=1.0, aim=1.3)


def prefill(bench: Bench) -> None:
    """A long prompt against llama.cpp."""
    peers = bench.figures(PREFILL, (LLAMA_CPP, NATIVE_LLAMA_CPP))
    _against_llama_cpp(bench, PREFILL, "llama.cpp", peers, bound=4.0, aim=6.0)


def share(bench: Bench) -> None:
    """What of the machine's own rate a prefill reaches."""
    found = own_inside("share", model=bench.model, dtype=PLAIN_DTYPE, threads=bench.threads, rounds=bench.rounds)
    if found["compute_dtype"] == "fp32":
        # Its products of weights in blocks are of whole numbers there, and no part of that rate.
        found = own_inside("share", model=bench.model, dtype="fp32", threads=bench.threads, rounds=bench.rounds)
    rate, reached = found["matrix_operations_per_second"], found["prefill_operations_per_second"]
    bench.table.at_least(
        "share of the machine's matrix rate in prefill",
        100 * found["share"],
        60,
        "%",
        f"{reached / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s in {found['compute_dtype']}, products of 1,024 x 4,096 x"
        f" 4,096; {PREFILL_TOKENS} tokens",
        aim=80,
    )


def through_triton(bench: Bench) -> None:
    """Triton's streams against the engine alone, in turn."""
    asyncio.run(_through_triton(bench, bench.best_dtype(DECODE_MANY)))


async def _through_triton(bench: Bench, dtype: str) -> None:
    prompts = DECODE_MANY.prompts_file(bench.folder)
    # An engine that has run paces its prompts, and one that is new does not know how yet.
    case = dataclasses.replace(DECODE_MANY, settings={"step-stretch": 0})
    pairs = []
    async with running_triton(bench.folder, _settings(bench, dtype) | {"step_stretch": 0}) as (address, _):
        for _ in range(bench.rounds):
            alone = await asyncio.to_thread(
                own_bench, case, prompts, model=bench.model, dtype=dtype, threads=bench.threads
            )
            print("  through Triton", file=sys.stderr, flush=True)
            pairs.append((await tokens_per_second(address, DECODE_MANY), float(alone["tokens_per_second"])))
    words = ", ".join(f"{through:.0f}/{alone:.0f}" for through, alone in pairs)
    bench.table.at_least(
        f"tokens/s through Triton against the engine alone, {STREAMS} streams",
        100 * statistics.median(through / alone for through, alone in pairs),
        90,
        "%",
        f"{dtype}, {ANSWER_TOKENS} tokens each, prefill included, unpaced, in turn; tokens/s {words}",
        aim=97,
    )


def start(bench: Bench) -> None:
    """From nothing to ready, with weights cached."""
    asyncio.run(_start(bench))


async def _start(bench: Bench) -> None:
    seconds = []
    # The first start only fills the cache.
    for _ in range(bench.rounds + 1):
        print("  starting Triton", file=sys.stderr, flush=True)
        async with running_triton(bench.folder, _settings(bench, bench.default_dtype)) as (_, ready_after):
            seconds.append(ready_after)
    bench.table.at_most(
        "start of Triton to ready, weights cached",
        statistics.median(seconds[1:]),
        10,
        "s",
        f"{bench.default_dtype}; {', '.join(f'{each:.1f}' for each in seconds[1:])} s",
        aim=5,
    )


def memory(bench: Bench) -> None:
    """What is resident beside the KV blocks, of weights that are bf16 and not a file's blocks."""
    folder = hugging_face_folder(bench.model, PEER_MODELS, PLAIN_DTYPE)
    found = own_inside("memory", model=str(folder), dtype=PLAIN_DTYPE, threads=bench.threads)
    resident, kv = found["resident_bytes"], found["kv_bytes"]
    bench.table.at_most(
        "resident memory beside the KV blocks",
        (resident - kv) / 2**30,
        1.5,
        "GiB",
        f"{PLAIN_DTYPE} weights; at most {resident / 2**30:.2f} GiB, of which {kv / 2**30:.2f} GiB are the KV blocks of"
        f" 32 x 2,048 tokens, {found['kv_used']:.0%} of them used",
    )


def gap(bench: Bench) -> None:
    """What a long prompt costs those that run."""
    dtype = bench.best_dtype(DECODE_MANY)
    found = own_inside("gap", model=bench.model, dtype=dtype, threads=bench.threads, rounds=bench.rounds)
    ms = {name: 1000 * found[name] for name in ("calm_p50", "calm_p99", "disturbed_p50", "disturbed_p99")}
    bench.table.at_most(
        "P99 gap between tokens while a prompt of 4,000 tokens arrives, against without",
        found["ratio"],
        2,
        "x",
        f"{dtype}, 31 streams, {found['step_token_budget']} tokens a step; {ms['disturbed_p99']:.0f} ms against"
        f" {ms['calm_p99']:.0f} ms, p50 {ms['disturbed_p50']:.0f} ms against {ms['calm_p50']:.0f} ms",
    )


def churn(bench: Bench) -> None:
    """Whether memory grows, or blocks are lost, while requests come and go."""
    found = own_inside(
        "churn", model=bench.model, dtype=PLAIN_DTYPE, threads=bench.threads, seconds=bench.churn_seconds
    )
    bench.table.at_most(
        f"memory grown in {bench.churn_seconds:.0f} s of requests that come and go",
        found["grown_bytes"] / 2**20,
        32,
        "MiB",
        f"{PLAIN_DTYPE}; {found['requests']} requests, {found['left']} left early, {found['steps']} steps,"
        f" {found['preemptions']} preemptions; the first fifth is warm-up",
        aim=1,
    )
    bench.table.at_most(
        "KV blocks lost in it",
        found["blocks_lost"],
        0,
        "blocks",
        f"a prompt that takes the whole context, or all blocks, then ends with {found['longest_ended']!r}",
    )


def quality(bench: Bench) -> None:
    """What each type costs, on a text that the model has not seen, of weights that no type keeps as they are."""
    file = bench.folder / "text.json"
    file.write_text(json.dumps(bench.token_ids(TEXT_FILE.read_text(encoding="utf-8"))))
    plain = hugging_face_folder(bench.model, PEER_MODELS, PLAIN_DTYPE)
    eight = hugging_face_folder(bench.model, PEER_MODELS, "fp8")
    kinds = {dtype: (str(plain), dtype) for dtype in bench.dtypes if dtype != PLAIN_DTYPE}
    kinds["FP8 weights"] = (str(eight), PLAIN_DTYPE)
    kinds["the file's blocks"] = (bench.model, PLAIN_DTYPE)
    kinds["the file's blocks, w8a8"] = (bench.model, "w8a8")

    def found(model: str, dtype: str) -> dict[str, Any]:
        return own_inside("agreement", model=model, dtype=dtype, threads=bench.threads, text=file)

    base = found(str(plain), PLAIN_DTYPE)
    count = len(base["likeliest"])
    how = f"{count} tokens of {TEXT_FILE.name}"
    for kind, (model, dtype) in kinds.items():
        other = found(model, dtype)
        same = sum(one == two for one, two in zip(other["likeliest"], base["likeliest"], strict=True))
        bench.table.at_most(
            f"perplexity of {kind} against {PLAIN_DTYPE}",
            other["perplexity"] / base["perplexity"],
            MOST_PERPLEXITY,
            "x",
            f"{other['perplexity']:.3f} against {base['perplexity']:.3f}, {how}",
        )
        bench.table.at_least(
            f"likeliest token the same of {kind} as of {PLAIN_DTYPE}",
            100 * same / count,
            LEAST_AGREEMENT,
            "%",
            f"{same} of {how}",
        )


def window(bench: Bench) -> None:
    """What a long text gains and loses with the attention window. The text is what `help()` of any Python knows."""
    words = "\n\n".join(topics[name] for name in sorted(topics))[: 8 * LONG_TEXT_TOKENS]
    file = bench.folder / "long.json"
    file.write_text(json.dumps(bench.token_ids(words)[:LONG_TEXT_TOKENS]))

    def found(attention_window: int) -> dict[str, Any]:
        settings = {"text": file, "first": EngineConfig.attention_window_from, "attention-window": attention_window}
        return own_inside("long-text", model=bench.model, dtype=PLAIN_DTYPE, threads=bench.threads, **settings)

    every, near = found(0), found(WINDOW)
    what = f"a window of {WINDOW} from {EngineConfig.attention_window_from} on"
    how = f"{near['perplexity']:.2f} against {every['perplexity']:.2f}, {near['scored_tokens']} tokens"
    ratio = near["perplexity"] / every["perplexity"]
    bench.table.at_most(f"{what}: perplexity of the tokens there, against all", ratio, 1.25, "x", how)
    for name, phase in (("decode_tokens_per_second", "decode"), ("prefill_tokens_per_second", "prefill")):
        how = f"tokens/s {near[name]:.0f} against {every[name]:.0f}, one sequence, {PLAIN_DTYPE}"
        row = f"{what}: {phase} of {LONG_TEXT_TOKENS} tokens, against all"
        bench.table.at_least(row, near[name] / every[name], 1, "x", how)
    how = f"blocks after the prompt {near['blocks']} against {every['blocks']}; at most {near['most_blocks']}"
    bench.table.at_most(f"{what}: KV blocks, against all", near["blocks"] / every["blocks"], 0.2, "x", how)


def drafts(bench: Bench) -> None:
    """What prompt-lookup drafts gain where a prompt repeats itself, and where nothing repeats but the answer."""
    passage = bench.token_ids(TEXT_FILE.read_text(encoding="utf-8"))[:DRAFT_PASSAGE_TOKENS]
    for what, times, bound, aim in (("stands there four times", 4, 1.2, 2.0), ("stands there once", 1, 0.9, 1.0)):
        prompt = times * passage
        file = bench.folder / "drafts.json"
        file.write_text(json.dumps([prompt]))
        case = Case(f"a text that {what}", 1, len(prompt), ANSWER_TOKENS, "decode_tokens_per_second")
        runs: dict[int, list[dict[str, Any]]] = {0: [], EngineConfig.speculation_tokens: []}
        for _ in range(bench.rounds):
            for count, results in runs.items():
                tried = dataclasses.replace(case, settings={"speculation-tokens": count})
                results.append(own_bench(tried, file, model=bench.model, dtype=PLAIN_DTYPE, threads=bench.threads))
        without, drafted = (
            statistics.median(float(result[case.figure]) for result in results) for results in runs.values()
        )
        last = runs[EngineConfig.speculation_tokens][-1]
        how = (
            f"tokens/s {drafted:.0f} against {without:.0f}, one sequence, {PLAIN_DTYPE};"
            f" {last['accepted_tokens']} of {last['drafted_tokens']} drafted tokens were right"
        )
        bench.table.at_least(
            f"drafts for a text that {what}, against none", drafted / without, bound, "x", how, aim=aim
        )


def gpu(bench: Bench) -> None:
    """The engine on a GPU, where there is one."""
    engine_gpu.measure(
        bench.table,
        Path(triton_python()),
        TRANSFORMERS.python(bench.peers),
        device="cuda",
        shapes=engine_gpu.FULL_SHAPES,
        rounds=bench.rounds,
    )


PARTS: Final[dict[str, Callable[[Bench], None]]] = {
    "decode-one": decode_one,
    "decode-many": decode_many,
    "prefill": prefill,
    "share": share,
    "triton": through_triton,
    "start": start,
    "memory": memory,
    "gap": gap,
    "churn": churn,
    "quality": quality,
    "window": window,
    "drafts": drafts,
    "gpu": gpu,
}


def all_dtypes() -> list[str]:
    """Every type that the engine has, the default among them."""
    return list(dict.fromkeys((*DTYPES, default_dtype())))


def default_dtype() -> str:
    """The type that the engine runs in when it is not told."""
    return next(str(field.default) for field in dataclasses.fields(EngineConfig) if field.name == "dtype")


def _against_llama_cpp(bench: Bench, case: Case, name: str, peers: Figures, *, bound: float, aim: float) -> None:
    """A row against the package's build, and one without a bound against the machine's own build."""
    _compare(bench, case, name, _of(peers, LLAMA_CPP), bound=bound, aim=aim)
    native = _of(peers, NATIVE_LLAMA_CPP)
    if native:
        _compare(bench, case, "llama.cpp built for this machine (no bound)", native, bound=0.0)


def _of(figures: Figures, *peers: Peer) -> Figures:
    return {peer.name: figures[peer.name] for peer in peers if peer.name in figures}


def _compare(bench: Bench, case: Case, name: str, peers: Figures, *, bound: float, aim: float | None = None) -> None:
    """Our best figure against the peers' best; where there is no peer, ours is only noted."""
    if not peers:
        bench.table.note(f"{case.name}, against {name}: no peer ran; ours {bench.words(case)}")
        return
    best = max(figure for figure, _ in peers.values())
    ordered = sorted(peers.values(), key=lambda found: -found[0])
    own = bench.own(case)
    bench.table.at_least(
        f"{case.name}, against {name}",
        own[bench.best_dtype(case)] / best,
        bound,
        "x",
        f"{bench.words(case)}; {'; '.join(words for _, words in ordered)}",
        aim=aim,
    )


def _of_peer(name: str, results: list[dict[str, Any]], case: Case) -> tuple[float, str]:
    figure = statistics.median(float(result[case.figure]) for result in results)
    first = results[0]
    return figure, f"{name} {first['version']} {figure:.0f} ({first['detail']})"


def _settings(bench: Bench, dtype: str) -> dict[str, object]:
    return {"model_path": bench.model, "dtype": dtype, "thread_count": bench.threads, "max_sequences": STREAMS}


def measure(arguments: argparse.Namespace) -> int:
    """Runs the parts, in their order."""
    CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
    # The client tells when its Triton comes and goes, which here is meant.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    table = Table(f"The engine, {arguments.threads} threads, {Path(arguments.model).name}")
    failed = False
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder:
        bench = Bench(arguments, table, Path(folder))
        for part, run in PARTS.items():
            if part in (arguments.only or PARTS):
                print(part, file=sys.stderr, flush=True)
                try:
                    run(bench)
                except (RunFailed, TritonDidNotStart) as failure:
                    failed = True
                    table.note(f"{part}: FAILED: {failure}")
    return table.finish(arguments.json) or int(failed)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, help=f"folder with an environment a peer: {', '.join(PEER_NAMES)}")
    parser.add_argument("--rounds", type=int, default=3, help="how often all take turns; the median counts")
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--churn-seconds", type=float, default=600.0, help="how long requests come and go")
    parser.add_argument("--dtype", action="append", choices=all_dtypes(), help="ours, this alone; may be repeated")
    parser.add_argument("--model", default=default_model_path(), help="a GGUF file")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="measure this part alone; may be repeated")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows to this file")
    sys.exit(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
