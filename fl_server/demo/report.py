"""What the demo measured, as `report.json`, as a page and as a table on the terminal."""

import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fl_server.demo.load import Answer

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1d2433;background:#fff}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin-top:2rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.8rem;margin:1.4rem 0}
.card{border:1px solid #d9dee8;border-radius:8px;padding:.7rem .9rem}.card b{display:block;font-size:1.4rem}
.card span{color:#5b6578;font-size:.85rem}table{border-collapse:collapse;width:100%}
td,th{text-align:right;padding:.3rem .7rem;border-bottom:1px solid #e6e9f0}td:first-child,th:first-child{text-align:left}
svg{width:100%;height:auto}p{color:#5b6578}
"""
_COLOURS = {"metric": "#1f5fbf", "epsilon": "#c2571a", "latency": "#1f5fbf", "swap": "#8a93a5"}


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRow:
    """One candidate that the run produced.

    Attributes:
        version: Its number; None for a candidate that the gate refused.
        round: That made it; 0 for the untrained first version.
        metric: On the server's own held-out data.
        bytes_pushed: Bytes a device on the previous version had to fetch.
    """

    version: int | None
    round: int
    metric: float
    epsilon: float
    bytes_pushed: int
    promoted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything one demo measured; field names of `build_document` are promises, see the README."""

    model: str
    unit: str
    epsilon: float
    delta: float
    seconds: float
    metric_name: str
    per_device: Sequence[float]
    versions: Sequence[VersionRow]
    answers: Sequence[Answer]
    agent_rss_mb: float
    training_rss_mb: float

    @property
    def value(self) -> float:
        return float(np.mean(self.per_device))

    @property
    def failed(self) -> int:
        return sum(answer.version is None for answer in self.answers)


def build_document(report: Report) -> dict[str, Any]:
    """Return the report as the documented JSON object."""
    return {
        "model": report.model,
        "devices": len(report.per_device),
        "unit": report.unit,
        "epsilon": round(report.epsilon, 4),
        "delta": report.delta,
        "seconds": round(report.seconds, 1),
        "versions": [
            {
                "version": row.version,
                "round": row.round,
                "metric": round(row.metric, 4),
                "epsilon": round(row.epsilon, 4),
                "bytes_pushed": row.bytes_pushed,
                "promoted": row.promoted,
            }
            for row in report.versions
        ],
        "requests": {"sent": len(report.answers), "failed": report.failed, **_latencies(report.answers)},
        "agent_rss_mb": round(report.agent_rss_mb, 1),
        "training_rss_mb": round(report.training_rss_mb, 1),
        "metric": {
            "name": report.metric_name,
            "value": round(report.value, 4),
            "per_device": [round(value, 4) for value in report.per_device],
        },
    }


def build_table(report: Report) -> str:
    """Return the versions and the totals as lines for a terminal."""
    lines = [f"{'round':>5} {'version':>8} {report.metric_name:>9} {'epsilon':>8} {'bytes':>8}  released"]
    for row in report.versions:
        version = "-" if row.version is None else str(row.version)
        verdict = "yes" if row.promoted else "no: not better than the champion"
        lines.append(
            f"{row.round:>5} {version:>8} {row.metric:>9.3f} {row.epsilon:>8.2f} {row.bytes_pushed:>8}  {verdict}"
        )
    latencies = _latencies(report.answers)
    lines += [
        "",
        f"{report.metric_name} {report.value:.3f} on held-out data, asked from {len(report.per_device)} devices over HTTP",
        f"epsilon {report.epsilon:.2f} at delta {report.delta:g}, protecting each {report.unit}",
        f"{len(report.answers)} requests during training and updates, {report.failed} failed",
        f"latency p50 {latencies['p50_ms']:.1f} ms, p99 {latencies['p99_ms']:.1f} ms",
        f"memory: agent {report.agent_rss_mb:.0f} MB, training process {report.training_rss_mb:.0f} MB",
    ]
    return "\n".join(lines)


def save_report(report: Report, directory: Path) -> None:
    """Write `report.json` and `report.html` into `directory`."""
    document = build_document(report)
    (directory / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    (directory / "report.html").write_text(_build_page(report, document))


def _latencies(answers: Sequence[Answer]) -> dict[str, float]:
    values = [answer.latency_ms for answer in answers if answer.version is not None] or [float("nan")]
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


def _build_page(report: Report, document: Mapping[str, Any]) -> str:
    cards = {
        f"{report.metric_name} over HTTP": f"{report.value:.3f}",
        f"epsilon, per {report.unit}": f"{report.epsilon:.2f}",
        "devices": str(len(report.per_device)),
        "released versions": str(sum(row.promoted for row in report.versions)),
        "failed requests": f"{report.failed} of {len(report.answers)}",
        "agent memory": f"{report.agent_rss_mb:.0f} MB",
    }
    rows = "".join(
        f"<tr><td>{'-' if row.version is None else row.version}</td><td>{row.round}</td><td>{row.metric:.3f}</td>"
        f"<td>{row.epsilon:.2f}</td><td>{row.bytes_pushed:,}</td><td>{'yes' if row.promoted else 'no'}</td></tr>"
        for row in report.versions
    )
    card_html = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
        for name, value in cards.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>edge-fl demo: {html.escape(report.model)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(report.model)}: learned on devices, released live</h1>"
        f"<p>{len(report.per_device)} devices trained in private for {report.seconds:.0f} s; no sample left any of them."
        f' Delta {report.delta:g}.</p><div class="cards">{card_html}</div>'
        f"<h2>{html.escape(report.metric_name).capitalize()} and privacy by round</h2>{_plot_versions(report)}"
        f"<h2>Request latency across the swaps</h2>{_plot_latency(report)}"
        f"<h2>Versions</h2><table><tr><th>version</th><th>round</th><th>{html.escape(report.metric_name)}</th>"
        f"<th>epsilon</th><th>bytes a device fetched</th><th>released</th></tr>{rows}</table>"
        f'<script type="application/json" id="report">{json.dumps(document)}</script></html>\n'
    )


def _plot_versions(report: Report) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axis = figure.subplots()
    rounds = [row.round for row in report.versions]
    axis.plot(rounds, [row.metric for row in report.versions], color=_COLOURS["metric"], linewidth=2)
    for row in report.versions:
        face = _COLOURS["metric"] if row.promoted else "white"
        axis.plot(row.round, row.metric, "o", color=_COLOURS["metric"], markerfacecolor=face, markersize=8)
        if row.version is not None:
            axis.annotate(f"v{row.version}", (row.round, row.metric), (0, 9), textcoords="offset points", ha="center")
    axis.set(xlabel="round", ylim=(0, 1.12), xticks=rounds)
    axis.set_ylabel(f"{report.metric_name}, server's held-out data", color=_COLOURS["metric"])
    twin = axis.twinx()
    twin.plot(rounds, [row.epsilon for row in report.versions], color=_COLOURS["epsilon"], linestyle="--")
    twin.set_ylim(0, max(1.0, report.epsilon * 1.25))
    twin.set_ylabel("epsilon spent", color=_COLOURS["epsilon"])
    for side in (axis, twin):
        side.spines["top"].set_visible(False)
    return _svg(figure)


def _plot_latency(report: Report) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axis = figure.subplots()
    good = [answer for answer in report.answers if answer.version is not None]
    start = report.answers[0].at_s if report.answers else 0.0
    axis.scatter(
        [answer.at_s - start for answer in good],
        [answer.latency_ms for answer in good],
        s=3,
        color=_COLOURS["latency"],
        alpha=0.35,
        linewidths=0,
        rasterized=True,
    )
    for version, at_s in _first_answers(good).items():
        axis.axvline(at_s - start, color=_COLOURS["swap"], linewidth=1, linestyle=":")
        axis.annotate(f"v{version}", (at_s - start, 1), (3, -10), xycoords=("data", "axes fraction"),
                      textcoords="offset points", color=_COLOURS["swap"])  # fmt: skip
    axis.set(xlabel="seconds since the first request", ylabel="latency, ms (log)", yscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def _first_answers(answers: Sequence[Answer]) -> dict[int, float]:
    first: dict[int, float] = {}
    for answer in answers:
        if answer.version is not None:
            first.setdefault(answer.version, answer.at_s)
    return first


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
