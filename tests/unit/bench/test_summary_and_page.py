"""The ledger in figures, and the page."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from tidegate.bench import ledger as ledgers
from tidegate.bench.arrivals import Constant
from tidegate.bench.flows import Flow, Load
from tidegate.bench.ledger import Attempt, Comparison, Ending, Ledger, Outcome, Record, WorkerFigures, judge
from tidegate.bench.plan import Plan
from tidegate.bench.report.page import page
from tidegate.bench.report.pictures import PICTURES, limited_tenants, prepare, shed_level
from tidegate.bench.samples import Sample, from_snapshot
from tidegate.bench.summary import summary
from tidegate.bench.tables import summary_rows
from tidegate.v1 import scheduler_pb2


def record(number: int, *attempts: Attempt, tenant: str = "a", planned: float = 0.0, deadline: float = 2.0) -> Record:
    made = Record(
        number=number, flow="f", tenant=tenant, service_class="standard", planned=planned, deadline_seconds=deadline,
        prompt_tokens=10, asked_tokens=10, attempts=list(attempts),
    )  # fmt: skip
    made.outcome = judge(made)
    return made


def answer(sent: float, first: float, last: float, tokens: int) -> Attempt:
    return Attempt(due=sent, sent=sent, ended=last, ending=Ending.COMPLETED, accepted=sent, first_token=first,
                   last_token=last, token_count=tokens)  # fmt: skip


def refusal(sent: float, ended: float) -> Attempt:
    return Attempt(due=sent, sent=sent, ended=ended, ending=Ending.REFUSED, reason="SERVER_IS_OVERLOADED",
                   retry_after_seconds=1)  # fmt: skip


RECORDS = [
    record(0, answer(0.0, 0.5, 1.4, 10)),
    record(1, answer(1.0, 1.5, 3.5, 11), planned=1.0, tenant="b"),
    record(2, refusal(1.0, 1.004), planned=1.0),
    record(3, refusal(2.0, 2.002), answer(2.5, 2.75, 3.0, 6), planned=2.0),
    record(4, Attempt(due=3, sent=3, ended=4, ending=Ending.LEFT, accepted=3.1, first_token=3.2, last_token=3.9,
                      token_count=3), planned=3.0),
    record(5, planned=3.5),
]  # fmt: skip


def ledger(records=RECORDS, name="with", **fields) -> Ledger:
    load = Load(
        name="test", flows=(Flow(name="f", arrivals=Constant(1), duration_seconds=4, tenants={"a": 1, "b": 1}),)
    )
    return Ledger(
        name=name, plan=Plan(load=load), began_unix_seconds=1.8e9, duration_seconds=4, records=records, **fields
    )


def test_outcomes_are_judged_by_the_planned_time():
    assert [each.outcome for each in RECORDS] == [
        Outcome.IN_TIME, Outcome.LATE, Outcome.REFUSED, Outcome.IN_TIME, Outcome.LEFT, Outcome.NOT_SENT
    ]  # fmt: skip


def test_figures_count_what_was_in_time_from_the_planned_time():
    figures = summary(ledger())
    assert figures.all.goodput == 2 / 4
    assert figures.all.goodput_share == pytest.approx(2 / 6)
    assert figures.all.tokens_per_second == (10 + 6) / 4
    assert figures.all.ttft["p50"] == pytest.approx(0.5)
    assert figures.all.latency["p99.9"] == pytest.approx(2.5, abs=0.01)
    assert figures.all.refused == {"SERVER_IS_OVERLOADED": 1}
    assert figures.attempts == 6
    assert figures.tenants["b"].outcomes == {"late": 1}


def test_tokens_of_what_was_not_in_time_are_wasted():
    figures = summary(ledger())
    assert figures.wasted_tokens == 11 + 3
    assert figures.wasted_token_share == pytest.approx(14 / 30)


def test_a_generator_that_was_behind_or_busy_warns():
    late = [record(0, answer(0.3, 0.5, 1.0, 2))]
    busy = WorkerFigures(cpu_seconds=9.9, wall_seconds=10)
    warnings = summary(ledger(late, workers=[busy])).warnings
    assert any("behind its plan by 300 ms" in warning for warning in warnings)
    assert any("99% of a core" in warning for warning in warnings)
    assert summary(ledger(RECORDS[:1], workers=[WorkerFigures(cpu_seconds=1, wall_seconds=10)])).warnings == []


def test_a_count_that_does_not_agree_and_requests_not_sent_warn():
    row = Comparison(name="refused X", client_low=3, client_high=3, server=4)
    warnings = summary(ledger(agreement=[row])).warnings
    assert any("refused X: the server says 4" in warning for warning in warnings)
    assert any("1 requests were not sent" in warning for warning in warnings)


def test_an_empty_run_has_figures_too():
    figures = summary(ledger([]))
    assert figures.all.requests == 0
    assert math.isnan(figures.all.ttft["p50"])
    assert summary_rows([figures])
    assert "nothing" in page("empty", [ledger([])]) or "<table" in page("empty", [ledger([])])


def test_a_ledger_is_written_and_read_again(tmp_path):
    path = tmp_path / "run.ledger"
    ledgers.write(ledger(), path)
    assert ledgers.read(path) == ledger()


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.outside: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.outside += [value for name, value in attributes if name in ("src", "href") and value]
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_has_every_run_in_every_picture_and_nothing_from_elsewhere():
    samples = [Sample(seconds=each / 4, waiting={"standard": each}, drain_rate=1, credits=3, in_flight=2,
                      ready_replicas=1, running=2, brownout_step=each % 3) for each in range(16)]  # fmt: skip
    runs = [ledger(samples=samples), ledger(name="without <any>", samples=samples)]
    text = page("a flood", runs, capacity=12.5, text="what it does")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.outside == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert "without <any>" not in text
    assert text.count("without &lt;any&gt;</figcaption>") == text.count("with</figcaption>") == tags.count["svg"] / 2
    assert tags.count["svg"] == 2 * len(PICTURES)
    assert "C = 12.5 requests/s" in text


def test_a_sample_has_what_envoy_refuses_for_the_scheduler():
    snapshot = scheduler_pb2.Snapshot(
        lanes=[
            scheduler_pb2.LaneSnapshot(service_class=1),
            scheduler_pb2.LaneSnapshot(service_class=2, shed_share=0.75),
        ],
        brownout_step=3,
        limited_tenant_count=2,
    )
    sample = from_snapshot(snapshot, 1.5)
    assert (sample.shed, sample.limited_tenants) == ({"realtime": 0.0, "standard": 0.75}, 2)
    assert sample.brownout_step == 3


def test_the_shed_level_shows_the_step_and_what_envoy_refuses_on_one_scale():
    samples = [Sample(seconds=each, waiting={}, drain_rate=1, credits=3, in_flight=2, ready_replicas=1, running=2,
                      brownout_step=5 * each, shed={"standard": 0.75 * each}, limited_tenants=3 * each)
               for each in (0, 1)]  # fmt: skip
    run = prepare(ledger(samples=samples))
    chart = shed_level(run)
    assert [(layer.name, layer.ys) for layer in chart.layers] == [("brownout, a fifth each step", [0.0, 1.0])]
    assert {line.name: line.ys for line in chart.lines} == {
        "realtime refused by Envoy": [0.0, 0.0],
        "standard refused by Envoy": [0.0, 0.75],
        "batch refused by Envoy": [0.0, 0.0],
    }
    assert max(chart.heights()) == 1.0
    assert [layer.ys for layer in limited_tenants(run).layers] == [[0.0, 3.0]]


def test_charts_side_by_side_have_the_same_scale():
    more = [record(number, answer(0, 0.1, 0.2, 3)) for number in range(400)]
    text = page("two", [ledger(RECORDS[:1]), ledger(more)])
    goodput = text.split("<h2>Goodput</h2>")[1].split("</section>")[0]
    ticks = [re.findall(r'text-anchor="end">([\d.k]+)</text>', figure) for figure in goodput.split("</figure>")[:2]]
    assert ticks[0] == ticks[1] != []
