"""llama.cpp built for this machine's own processor, as llama-cpp-python builds it: its C interface, step by step."""

from __future__ import annotations

import time

import llama_cpp
import numpy as np
from measure import Job, parse_job, report

BATCH_TOKENS = 2048


class Sequences:
    """A model with a context that holds all sequences of a job."""

    def __init__(self, job: Job) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        # With them its AMX products of Q4_1 end the process (0.3.36); other processors have none for Q4_1.
        model.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(job.model.encode(), model)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = len(job.prompts) * job.context_tokens
        parameters.n_batch = BATCH_TOKENS
        parameters.n_seq_max = len(job.prompts)
        parameters.n_threads = parameters.n_threads_batch = job.threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocabulary_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[float]]:
        """When each token of each sequence came; nothing is kept from an earlier call."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        moments: list[list[float]] = [[] for _ in prompts]
        assert sum(map(len, prompts)) <= BATCH_TOKENS
        rows = [(each, token, place) for each, prompt in enumerate(prompts) for place, token in enumerate(prompt)]
        ends = [len(prompt) - 1 for prompt in prompts]
        for _ in range(tokens):
            chosen = self._step(rows, ends)
            now = time.perf_counter()
            for times in moments:
                times.append(now)
            ends = [end + 1 for end in ends]
            rows = [(each, token, ends[each]) for each, token in enumerate(chosen)]
        return moments

    def _step(self, rows: list[tuple[int, int, int]], ends: list[int]) -> list[int]:
        """Computes rows of sequence, token and position; the likeliest token after each sequence's last."""
        batch = self._batch
        batch.n_tokens = len(rows)
        wanted = []
        for row, (sequence, token, position) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = position == ends[sequence]
            if batch.logits[row]:
                wanted.append(row)
        status = llama_cpp.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode: {status}"
        return [self._likeliest(row) for row in wanted]

    def _likeliest(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary_size,)).argmax())


def main() -> None:
    """Measures one job, after a short one that warms up."""
    job = parse_job()
    sequences = Sequences(job)
    sequences.generate(job.prompts[:1], 4)
    begun = time.perf_counter()
    moments = sequences.generate(job.prompts, job.tokens)
    features = llama_cpp.llama_print_system_info().decode()
    names = [part.split("=")[0].split(":")[-1].strip() for part in features.split("|") if "= 1" in part]
    detail = " ".join(name for name in names if not name.startswith("AMX"))
    report(job, begun, moments, version=llama_cpp.__version__, detail=detail)


if __name__ == "__main__":
    main()
