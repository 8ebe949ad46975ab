"""What the replay says at its end: a table of measures, and a picture of the run over time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.plots import INK, figure
from bench.serving_engine import AttentionShare
from bench.serving_scheduler import Request, RequestState, Scheduler

PROMPT_COLOUR, ANSWER_COLOUR, WAITING_COLOUR, PREEMPTION_COLOUR = "#4477aa", "#228833", "#997700", "#cc3311"
TIME_BINS = 60


class StepSample(NamedTuple):
    """State of the replay at the end of one step, seconds after its start."""

    time: float
    running: int
    waiting: int
    used_pages: int
    chunks: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int


@dataclass(frozen=True)
class Measures:
    """Numbers of one replay, for the table."""

    requests: Sequence[Request]
    scheduler: Scheduler
    samples: Sequence[StepSample]
    seconds: float
    attention: AttentionShare | None
    set_up_compilations: int
    replay_compilations: int
    step_programs: int


def _percentiles(seconds: Sequence[float]) -> str:
    if not len(seconds):
        return "-"
    return " / ".join(f"{1000 * value:.1f}" for value in np.percentile(seconds, (50, 95, 99))) + " ms"


def build_table(rows: Sequence[tuple[str, str]]) -> Table:
    """The table of a finished (or interrupted) replay."""
    table = Table(box=SIMPLE_HEAD, title="Serving replay", title_justify="left")
    table.add_column("measure")
    table.add_column("value")
    for row in rows:
        table.add_row(*row)
    return table


def store(path: Path, facts: dict[str, str], rows: Sequence[tuple[str, str]], measures: Measures) -> None:
    """Store what the table and the picture are made of, and the tokens a second, for `bench.report`."""
    content = {
        "facts": facts,
        "title": facts["command"],
        "measures": rows,
        "generated_tokens_per_second": measures.scheduler.generated_tokens / max(measures.seconds, 1e-9),
        "pool_pages": measures.scheduler.pool.num_pages,
        "max_batch": measures.scheduler.max_batch,
        "samples": measures.samples,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n")


def measured_rows(measures: Measures) -> list[tuple[str, str]]:
    """Name and value of every measure, in words."""
    requests, scheduler, samples = measures.requests, measures.scheduler, measures.samples
    served = [request for request in requests if request.state is RequestState.SERVED]
    refused = sum(request.state is RequestState.REFUSED for request in requests)
    left = len(requests) - len(served) - refused
    rest = f", {left} left" if left else ""
    first = [request.token_times[0] - request.arrival for request in requests if request.token_times]
    between = [gap for request in requests for gap in np.diff(request.token_times).tolist()]
    prompt_tokens = sum(len(request.prompt) for request in served)
    seconds = max(measures.seconds, 1e-9)
    pool = scheduler.pool
    peak, mean = _peak_and_mean([sample.used_pages for sample in samples])
    peak_batch, mean_batch = _peak_and_mean([sample.running for sample in samples])
    return [
        ("requests", f"{len(requests)} submitted: {len(served)} served, {refused} refused{rest}"),
        ("replay", f"{measures.seconds:.2f} s, {len(samples)} steps"),
        ("steps with prompts", _prompt_steps(samples)),
        ("prompt tokens", f"{prompt_tokens} of served requests, {prompt_tokens / seconds:.0f} a second"),
        ("generated tokens", f"{scheduler.generated_tokens}, {scheduler.generated_tokens / seconds:.0f} a second"),
        ("computed tokens", f"{scheduler.computed_tokens}, of these {scheduler.dropped_tokens} dropped by preemption"),
        ("time to first token p50 / p95 / p99", _percentiles(first)),
        ("time between tokens p50 / p95 / p99", _percentiles(between)),
        ("batch", f"{mean_batch:.1f} sequences on average, {peak_batch:.0f} at most (limit {scheduler.max_batch})"),
        (
            "pool use",
            f"{mean / pool.num_pages:.0%} on average, {peak / pool.num_pages:.0%} at most of {pool.num_pages} pages",
        ),
        ("preemptions", f"{scheduler.preemptions}"),
        ("share of time in attention", _attention_share(measures.attention)),
        (
            "compilations",
            f"{measures.step_programs} step programs; programs of any kind: {measures.set_up_compilations} in set-up, "
            f"{measures.replay_compilations} during the replay",
        ),
    ]


def _peak_and_mean(values: Sequence[int]) -> tuple[float, float]:
    return (max(values), float(np.mean(values))) if values else (0.0, 0.0)


def _prompt_steps(samples: Sequence[StepSample]) -> str:
    chunks = [sample.chunks for sample in samples if sample.chunks]
    tokens = sum(sample.prompt_tokens for sample in samples)
    if not chunks:
        return "none"
    return (
        f"{len(chunks)}, each {np.mean(chunks):.1f} chunks and {tokens / len(chunks):.0f} prompt tokens on average, "
        f"{max(chunks)} chunks at most"
    )


def _attention_share(attention: AttentionShare | None) -> str:
    if attention is None:
        return "not measured"
    return (
        f"{attention.share:.0%}: {attention.timed_steps} recorded steps timed again after the replay, whole and their "
        "attention calls alone (all layers in one program, without projections and cache writes; medians), weighted by "
        "how often each step shape ran"
    )


def draw_timeline(samples: Sequence[StepSample], num_pages: int, max_batch: int, path: Path) -> None:
    """Draw batch size, pool use and tokens a second over the time of the run as a PNG."""
    with figure(path, rows=3, size=(10, 8), font_size=10) as (batch, pool, speed):
        times = np.asarray([sample.time for sample in samples])
        running = [sample.running for sample in samples]
        batch.fill_between(times, running, step="pre", color=PROMPT_COLOUR, alpha=0.35, linewidth=0)
        batch.step(times, running, where="pre", color=PROMPT_COLOUR, label="running")
        batch.step(times, [sample.waiting for sample in samples], where="pre", color=WAITING_COLOUR, label="waiting")
        batch.axhline(max_batch, color=INK, linewidth=0.8, linestyle=":", label=f"limit {max_batch}")
        batch.set_ylabel("sequences")

        pool.fill_between(
            times,
            [100 * sample.used_pages / num_pages for sample in samples],
            step="pre",
            color=ANSWER_COLOUR,
            alpha=0.45,
        )
        counts = np.asarray([sample.preemptions for sample in samples])
        preempted = times[np.diff(counts, prepend=0) > 0]
        if len(preempted):
            pool.plot(
                preempted,
                np.full(len(preempted), 104),
                "v",
                color=PREEMPTION_COLOUR,
                markersize=5,
                clip_on=False,
                label="preemption",
            )
        pool.set_ylabel(f"pool use, % of {num_pages} pages")
        pool.set_ylim(0, 108)

        edges, prompt, generated = _token_rates(samples)
        speed.stairs(
            prompt, edges, color=PROMPT_COLOUR, label="prompt tokens (recomputed ones included)", linewidth=1.4
        )
        speed.stairs(generated, edges, color=ANSWER_COLOUR, label="generated tokens", linewidth=1.4)
        speed.set_ylabel("tokens / s")
        speed.set_xlabel("seconds since the start of the replay")
        for axes in (batch, pool, speed):
            axes.margins(x=0)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.1)


def _token_rates(
    samples: Sequence[StepSample],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Edges of equal bins of time, and prompt and generated tokens a second in each."""
    times = np.asarray([sample.time for sample in samples])
    edges = np.linspace(0.0, max(float(times.max(initial=0.0)), 1e-3), min(TIME_BINS, max(len(samples), 1)) + 1)
    width = edges[1] - edges[0]
    prompt, generated = (
        np.histogram(times, edges, weights=np.asarray(counts, np.float64))[0] / width
        for counts in ([s.prompt_tokens for s in samples], [s.generated_tokens for s in samples])
    )
    return edges, prompt, generated
