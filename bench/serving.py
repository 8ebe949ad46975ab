"""Replay a production request trace through paged attention: `python -m bench.serving`.

A small decoder with random weights serves requests of the trace's sizes with continuous batching over a paged pool.
The default size is for two CPU cores; flags scale everything to a GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.serving_check import (
    Budget,
    Check,
    CheckError,
    check_books,
    check_interpreted_kernel,
    check_served_tokens,
    check_step_attention,
)
from bench.serving_engine import Compilations, Engine, cache_bytes
from bench.serving_model import ATTENTION_CHOICES, AttentionChoice, ModelConfig
from bench.serving_report import Measures, StepSample, build_table, draw_timeline, measured_rows, store
from bench.serving_scheduler import PagePool, Request, Scheduler
from bench.serving_trace import TraceError, TraceRequest, load_trace, scale_requests
from bench.timing import describe_machine

PLATFORMS = ("auto", "triton", "pallas", "xla")
DTYPES = ("float32", "bfloat16", "float16")
VERDICTS = {True: "[green]passed[/]", False: "[bold red]FAILED[/]", None: "[yellow]not made[/]"}
ATTENTION_WORDS = {
    "unified": "one unified_attention call a step",
    "page": "page_attention where a step only decodes, else unified_attention",
    "pallas": "JAX's own Pallas operation where a step only decodes, else unified_attention",
}
LONGEST_SLEEP = 0.05
CHECKED_REQUESTS = 4
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


@dataclass
class Replay:
    """What happened between the first arrival and the last token."""

    samples: list[StepSample] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False
    out_of_time: bool = False

    @property
    def is_unfinished(self) -> bool:
        """Whether requests were left that might have been served."""
        return self.interrupted or self.out_of_time


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the replay.

    Returns:
        The exit status: 0; 1 where a check failed; 2 for a wrong flag, trace or platform; 130 after Ctrl-C.
    """
    options = parse_arguments(arguments)
    console = Console()
    try:
        trace = load_trace(options.trace, options.requests, options.seed)
    except TraceError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return EXIT_USAGE
    speed = math.inf if options.all_at_once else options.arrival_speed
    requests = build_requests(
        scale_requests(trace.requests, options.size_scale, speed), options.vocabulary, options.seed
    )
    _print_header(console, options, trace.source, requests)
    try:
        return _serve(console, options, requests)
    except CheckError as error:
        console.print(f"[bold red]check failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return EXIT_FAILED
    except NotImplementedError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return EXIT_USAGE
    except KeyboardInterrupt:
        console.print("interrupted")
        return EXIT_INTERRUPTED


def _serve(console: Console, options: argparse.Namespace, requests: list[Request]) -> int:
    config = ModelConfig(
        layers=options.layers,
        hidden=options.hidden,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        intermediate=options.intermediate,
        vocabulary=options.vocabulary,
        dtype=options.dtype,
    )
    set_up, during_replay = Compilations(), Compilations()
    start = time.perf_counter()
    with _progress(console) as progress, set_up.watch():
        engine = Engine(
            config,
            pool_pages=options.pool_pages,
            page_size=options.page_size,
            max_batch=options.max_batch,
            max_context=options.max_context,
            step_tokens=options.step_tokens,
            attention=AttentionChoice(options.attention, options.platform),
            seed=options.seed,
        )
        task = progress.add_task("compiling step shapes", total=len(engine.shapes), note="")
        engine.warm_up(lambda: progress.advance(task))
    console.print(
        f"set-up: {time.perf_counter() - start:.1f} s for {engine.compiled_steps} step programs (sequences x tokens: "
        f"{', '.join(f'{sequences} x {tokens}' for sequences, tokens in engine.shapes)}); the pool holds "
        f"{cache_bytes(engine.caches) / 2**20:.0f} MiB",
        highlight=False,
        soft_wrap=True,
    )
    pool = PagePool(options.pool_pages, options.page_size)
    scheduler = Scheduler(
        pool, max_batch=options.max_batch, max_context=options.max_context, step_tokens=options.step_tokens
    )
    with _progress(console) as progress, during_replay.watch():
        replay = run_replay(engine, scheduler, requests, progress, options.time_limit)

    step_programs = engine.compiled_steps
    books = check_books(requests, scheduler, unfinished=replay.is_unfinished)
    with console.status("timing recorded steps"):
        attention = None if replay.interrupted else engine.measure_attention()
    measures = Measures(
        requests=requests,
        scheduler=scheduler,
        samples=replay.samples,
        seconds=replay.seconds,
        attention=attention,
        set_up_compilations=set_up.count,
        replay_compilations=during_replay.count,
        step_programs=step_programs,
    )
    rows = measured_rows(measures)
    console.print(build_table(rows))
    if options.json:
        store(options.json, describe_machine(), rows, measures)
    if replay.samples:
        draw_timeline(replay.samples, pool.num_pages, options.max_batch, options.output)
        console.print(f"timeline: {escape(str(options.output))}", highlight=False, soft_wrap=True)
    checks = [books]
    if options.check and not replay.interrupted:
        with console.status("checking served tokens and recorded steps"):
            checks += make_checks(engine, requests, options.check_seconds)
    for check in checks:
        verdict = VERDICTS[check.passed]
        console.print(f"check {verdict} {check.name}: {escape(check.detail)}", highlight=False, soft_wrap=True)
    if any(check.passed is False for check in checks):
        return EXIT_FAILED
    return EXIT_INTERRUPTED if replay.interrupted else 0


def make_checks(engine: Engine, requests: Sequence[Request], seconds: float) -> list[Check]:
    """Check served tokens and recorded steps, `seconds` each. On a CPU, also the Triton kernel in the interpreter."""
    checks = [
        check_served_tokens(engine, requests, CHECKED_REQUESTS, Budget(seconds)),
        check_step_attention(engine, seconds),
    ]
    if jax.default_backend() == "cpu":
        checks.append(check_interpreted_kernel(engine))
    return checks


def run_replay(
    engine: Engine,
    scheduler: Scheduler,
    requests: Sequence[Request],
    progress: Progress,
    time_limit: float = math.inf,
) -> Replay:
    """Submit requests as they arrive and run steps until all are served or refused.

    Ctrl-C ends it early, and so does the first step that ends `time_limit` seconds or more after the start.

    Raises:
        CheckError: the scheduler has requests but plans no step.
    """
    replay = Replay()
    arriving = deque(sorted(requests, key=lambda request: request.arrival))
    total = sum(request.max_new_tokens for request in requests)
    task = progress.add_task("serving", total=total, note="")
    start = time.perf_counter()
    try:
        while arriving or scheduler.has_work:
            now = time.perf_counter() - start
            if now >= time_limit:
                replay.out_of_time = True
                break
            while arriving and arriving[0].arrival <= now:
                request = arriving.popleft()
                if not scheduler.submit(request):
                    progress.console.print(f"refused request {request.index}: {request.refusal}", highlight=False)
                    total -= request.max_new_tokens
                    progress.update(task, total=total)
            plan = scheduler.schedule()
            if plan is None:
                if scheduler.has_work:
                    raise CheckError(
                        f"no step for {len(scheduler.waiting)} waiting, {len(scheduler.running)} running requests"
                    )
                if arriving:
                    time.sleep(min(max(arriving[0].arrival - now, 0.0), LONGEST_SLEEP))
                continue
            running, used_pages = len(scheduler.running), scheduler.pool.num_used
            tokens, logits = engine.run(plan)
            now = time.perf_counter() - start
            generated = scheduler.complete(plan, tokens, logits, now)
            replay.samples.append(
                StepSample(
                    now,
                    running,
                    len(scheduler.waiting),
                    used_pages,
                    len(plan.chunks),
                    plan.prompt_tokens,
                    generated,
                    scheduler.preemptions,
                )
            )
            note = (
                f"batch {running}, waiting {len(scheduler.waiting)}, pool {used_pages / scheduler.pool.num_pages:.0%}"
            )
            progress.update(task, advance=generated, note=note)
    except KeyboardInterrupt:
        replay.interrupted = True
    replay.seconds = time.perf_counter() - start
    return replay


def build_requests(sizes: Sequence[TraceRequest], vocabulary: int, seed: int) -> list[Request]:
    """Requests of the given sizes with random prompts: the trace holds no text."""
    generator = np.random.default_rng(seed)
    return [
        Request(
            index=index,
            arrival=size.arrival,
            prompt=generator.integers(vocabulary, size=size.context_tokens, dtype=np.int32),
            max_new_tokens=size.generated_tokens,
        )
        for index, size in enumerate(sizes)
    ]


def _print_header(console: Console, options: argparse.Namespace, source: str, requests: Sequence[Request]) -> None:
    arrivals = "all at once" if options.all_at_once else f"{options.arrival_speed:g} times as fast as recorded"
    prompt_tokens = sum(len(request.prompt) for request in requests)
    answer_tokens = sum(request.max_new_tokens for request in requests)
    device = jax.devices()[0]
    lines = [
        f"trace: {source}",
        f"sizes: multiplied by {options.size_scale:g}: {len(requests)} requests, {prompt_tokens} prompt tokens, "
        f"{answer_tokens} tokens to generate; arrivals: {arrivals}",
        f"model: random weights, {options.layers} layers, hidden {options.hidden}, {options.heads} query and "
        f"{options.kv_heads} KV heads of {options.head_dim}, MLP {options.intermediate}, {options.dtype}",
        f"device: {device.device_kind} ({device.platform}), jax {jax.__version__}; attention: "
        f"{ATTENTION_WORDS[options.attention]}, platform {options.platform}",
        f"pool: {options.pool_pages} pages of {options.page_size} tokens; batch <= {options.max_batch}, "
        f"tokens of a step <= {options.step_tokens}, context <= {options.max_context}",
    ]
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the flags; exits with status 2 and a message for a wrong one."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    load = parser.add_argument_group("load")
    load.add_argument("--trace", type=Path, help="CSV with TIMESTAMP,ContextTokens,GeneratedTokens; default: the Azure "
                      "trace in ../shared/traces, else sizes drawn from its statistics")  # fmt: skip
    load.add_argument("--requests", type=_positive, default=48, help="how many requests, from the start of the trace")
    load.add_argument("--size-scale", type=_positive_float, default=0.25, help="factor on prompt and answer lengths")
    load.add_argument(
        "--arrival-speed", type=_positive_float, default=10.0, help="how many times faster requests arrive"
    )
    load.add_argument("--all-at-once", action="store_true", help="all requests arrive at the start")
    load.add_argument("--seed", type=int, default=0, help="of weights, prompts and drawn sizes")
    serving = parser.add_argument_group("serving")
    serving.add_argument("--pool-pages", type=_positive, default=120, help="pages of the KV pool, in each layer")
    serving.add_argument("--page-size", type=_positive, default=16, help="tokens of a page")
    serving.add_argument("--max-batch", type=_positive, default=16, help="sequences that run at once")
    serving.add_argument("--max-context", type=_positive, default=1280, help="longest prompt and answer together")
    serving.add_argument("--step-tokens", type=_positive, default=128, help="most tokens of a step: one of each "
                         "decoding sequence, then chunks of as many prompts as fit")  # fmt: skip
    serving.add_argument("--time-limit", type=_positive_float, default=math.inf, help="seconds after which the replay "
                         "ends, whatever is left")  # fmt: skip
    serving.add_argument("--attention", choices=ATTENTION_CHOICES, default="unified", help="unified: one call of "
                         "unified_attention a step; page: page_attention for steps that only decode; pallas: JAX's "
                         "paged attention for these")  # fmt: skip
    serving.add_argument("--platform", choices=PLATFORMS, default="auto", help="of attention")
    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=_positive, default=4, help="decoder layers")
    model.add_argument("--hidden", type=_positive, default=256, help="width of the residual stream")
    model.add_argument("--heads", type=_positive, default=8, help="query heads")
    model.add_argument("--kv-heads", type=_positive, default=2, help="KV heads")
    model.add_argument("--head-dim", type=_positive, default=32, help="dims of a head")
    model.add_argument("--intermediate", type=_positive, default=768, help="width of the MLP")
    model.add_argument("--vocabulary", type=_positive, default=2048, help="tokens")
    model.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights, activations and cache")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("build/serving/timeline.png"), help="picture of the run")
    output.add_argument("--json", type=Path, help="store the measures and steps here, for bench.report")
    output.add_argument("--check-seconds", type=_positive_float, default=20.0, help="a check of tokens or of attention "
                        "that takes longer leaves out the rest of its sample")  # fmt: skip
    output.add_argument("--no-check", dest="check", action="store_false", help="check the books only")
    options = parser.parse_args(arguments)
    if options.heads % options.kv_heads:
        parser.error(f"--heads must be a multiple of --kv-heads, got {options.heads} and {options.kv_heads}")
    if options.head_dim % 2:
        parser.error(f"--head-dim must be even for rotary positions, got {options.head_dim}")
    if options.step_tokens < options.max_batch:
        parser.error(f"--step-tokens must be at least --max-batch, got {options.step_tokens} and {options.max_batch}")
    if options.layers * options.pool_pages * options.page_size >= 2**31:
        parser.error("--layers * --pool-pages * --page-size must stay below 2^31: slots are 32-bit integers")
    if options.output.suffix.lower() != ".png":
        parser.error(f"--output must name a .png file, got {options.output}")
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, got {options.seed}")
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
