"""The page: what happened in a sentence and a table, then the pictures, a column a run."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from html import escape

from tidegate.bench.ledger import Ledger
from tidegate.bench.report.charts import svg
from tidegate.bench.report.pictures import PICTURES, Picture, Run, prepare, side_by_side, tenants
from tidegate.bench.report.style import STYLE
from tidegate.bench.summary import Summary, summary
from tidegate.bench.tables import SPLIT_HEAD, Row, split_rows, summary_rows


def page(title: str, ledgers: Sequence[Ledger], *, capacity: float | None = None, text: str = "") -> str:
    """The whole page.

    Args:
        ledgers: the runs, in the order of their columns.
        capacity: C in requests per second, to mark it; None where it is not known.
        text: what this is about, under the title.
    """
    runs = [prepare(ledger) for ledger in ledgers]
    summaries = [summary(ledger) for ledger in ledgers]
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(text)}</p>" if text else "",
        _facts(ledgers, capacity),
        _headlines(summaries, capacity),
        *(_warning(each) for each in summaries if each.warnings),
        _table(("", *(each.name for each in summaries)), summary_rows(summaries)),
        f'<div class="{"pairs" if len(runs) == 1 else ""}">',
        *(_picture(picture, runs, capacity) for picture in PICTURES if _is_worth_it(picture, runs)),
        "</div>",
        *(_parts(each) for each in summaries),
        *(_agreement(each) for each in summaries if each.agreement),
        _foot(ledgers),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _facts(ledgers: Sequence[Ledger], capacity: float | None) -> str:
    first = ledgers[0]
    moment = datetime.datetime.fromtimestamp(first.began_unix_seconds, datetime.UTC)
    facts = [
        f"load {first.plan.load.name}",
        f"{first.duration_seconds:.0f} s",
        f"seed {first.plan.seed}",
        moment.strftime("%Y-%m-%d %H:%M UTC"),
    ]
    if capacity:
        facts.append(f"C = {capacity:.1f} requests/s: the highest rate at which 99 % meet their deadline")
    return f"<p>{escape(' · '.join(facts))}</p>"


def _headlines(summaries: Sequence[Summary], capacity: float | None) -> str:
    cards = []
    for each in summaries:
        of_capacity = f", {each.all.goodput / capacity:.0%} of C" if capacity else ""
        cards.append(
            f"<div><span>{escape(each.name)}</span><b>{each.all.goodput:.1f}/s in time</b>"
            f"<span>of {each.all.offered:.1f}/s offered{of_capacity}</span></div>"
        )
    return f'<div class="big">{"".join(cards)}</div>'


def _warning(each: Summary) -> str:
    return "".join(f'<div class="warning">{escape(each.name)}: {escape(warning)}</div>' for warning in each.warnings)


def _table(head: Sequence[str], rows: Sequence[Row]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>"
        for name, texts in rows
    )
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _picture(picture: Picture, runs: Sequence[Run], capacity: float | None) -> str:
    charts = side_by_side(picture, runs, capacity)
    figures = "".join(
        f"<figure><figcaption>{escape(run.ledger.name)}</figcaption>{svg(chart, f'{picture.title}: {run.ledger.name}')}"
        "</figure>"
        for run, chart in zip(runs, charts, strict=True)
    )
    title, text = escape(picture.title), escape(picture.text)
    return f'<section><h2>{title}</h2><p>{text}</p><div class="runs">{figures}</div></section>'


def _is_worth_it(picture: Picture, runs: Sequence[Run]) -> bool:
    if picture.draw is tenants and not any(len(run.ledger.plan.load.tenants) > 1 for run in runs):
        return False
    return any(not picture.draw(run).is_empty for run in runs)


def _parts(each: Summary) -> str:
    rows = split_rows(each)
    return f"<h2>{escape(each.name)}: by class, tenant and flow</h2>{_table(SPLIT_HEAD, rows)}" if rows else ""


def _agreement(each: Summary) -> str:
    head = ("", "ledger", "server", "agrees")
    rows: list[Row] = []
    for row in each.agreement:
        ledger = f"{row.client_low}" if row.client_low == row.client_high else f"{row.client_low} to {row.client_high}"
        rows.append((row.name, [ledger, str(row.server), "yes" if row.agrees else "NO"]))
    return (
        f"<h2>{escape(each.name)}: the ledger beside the server's counts</h2>"
        "<p>A client that leaves before it hears anything cannot know what became of its request; such requests make "
        f"a range.</p>{_table(head, rows)}"
    )


def _foot(ledgers: Sequence[Ledger]) -> str:
    count = sum(len(ledger.records) for ledger in ledgers)
    return (
        f"<footer>{count} requests. Latency counts from the moment for which a request was planned. Made by tidegate "
        "bench.</footer>"
    )
