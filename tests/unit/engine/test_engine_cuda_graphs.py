"""Steps filled up for a graph give what they gave without; what is a graph here is a call, as there is no GPU."""

import pytest
import torch

from llm_engine import SamplingParams, SequenceRequest
from llm_engine.cuda_graphs import GraphedDecodes, batch_sizes


def test_batches_are_filled_up_to_few_sizes():
    assert batch_sizes(1) == [1]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(100) == [1, 2, 4, 8, 16, 32, 64, 96, 100]


@pytest.fixture
def generate(make_engine, make_folder):
    # Heads that the kernels can attend to where their blocks lie.
    folder = make_folder({"num_attention_heads": 2, "num_key_value_heads": 1})

    def run(graphed: bool) -> tuple[dict[str, list[int]], list[int]]:
        engine = make_engine(folder)
        rank, replayed = engine._rank, []

        def capture(run):
            def replay():
                logits = run()
                replayed.append(len(logits))
                return logits

            return replay

        if graphed:
            rank._decodes = GraphedDecodes(
                lambda step: rank.model.forward(step, rank.kv_cache),
                most_sequences=8,
                most_tokens=engine.model_info.context_token_count,
                block_token_count=4,
                padding_block=rank.kv_cache.padding_block,
                device=torch.device("cpu"),
                capture=capture,
            )
        for index in range(5):
            tokens = [(7 * index + place) % 60 for place in range(3 + 4 * index)]
            request = SequenceRequest(
                request_id=str(index), token_ids=tokens, max_tokens=4 + 5 * index, ignore_eos=True,
                sampling=SamplingParams(temperature=0.0),
            )  # fmt: skip
            engine.add(request)
        found: dict[str, list[int]] = {}
        while engine.has_work:
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
        return found, replayed

    return run


def test_a_batch_that_is_filled_up_gets_the_same_answers(generate):
    expected, nothing = generate(graphed=False)
    found, sizes = generate(graphed=True)
    assert found == expected
    assert nothing == []
    # The first has ended before the last one decodes; the others end one after the other.
    assert [*dict.fromkeys(sizes)] == [4, 2, 1]
