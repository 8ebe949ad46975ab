"""The serving replay: the trace reader, the scheduler's books, and served tokens against a dense decoder."""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

from bench import serving, serving_check, serving_trace
from bench.serving_check import Budget, CheckError, check_books, dense_logits
from bench.serving_engine import Compilations, Engine
from bench.serving_model import AttentionChoice, Caches, ModelConfig, attend_step
from bench.serving_scheduler import PagePool, PoolError, Request, RequestState, Scheduler, StepPlan
from bench.serving_trace import TraceError, TraceRequest, draw_requests, load_trace, read_requests, scale_requests

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
TINY = ModelConfig(
    layers=2, hidden=16, heads=4, kv_heads=2, head_dim=8, intermediate=24, vocabulary=64, dtype="float32"
)


def make_request(index: int, prompt: int, answer: int, arrival: float = 0.0) -> Request:
    tokens = np.random.default_rng(index).integers(TINY.vocabulary, size=prompt, dtype=np.int32)
    return Request(index=index, arrival=arrival, prompt=tokens, max_new_tokens=answer)


class TestTrace:
    def test_reads_requests_in_order_of_arrival(self, tmp_path: Path) -> None:
        path = tmp_path / "trace.csv"
        lines = (
            f"\ufeff{HEADER},Model",
            "2023-11-16 18:15:48.5000000,30,4,a",
            "",
            "2023-11-16 18:15:46.2500000,10,0,b",
            "2023-11-16 18:15:47,20,3,c",
        )
        path.write_text("\n".join(lines), encoding="utf-8")
        assert read_requests(path) == (TraceRequest(0.0, 10, 0), TraceRequest(0.75, 20, 3), TraceRequest(2.25, 30, 4))
        assert read_requests(path, 1) == (TraceRequest(0.0, 30, 4),)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is empty, expected a header line"),
            (f"{HEADER}\n\n", "holds no requests"),
            ("TIMESTAMP,ContextTokens\n0,1\n", "line 1: no column GeneratedTokens"),
            (f"{HEADER}\n0,1,2\n0,1\n", "line 3: expected 3 fields, got 2"),
            (f"{HEADER}\n\n0,1,x\n", "line 3: GeneratedTokens must be a whole number.*got 'x'"),
            (f"{HEADER}\n0,-1,2\n", "line 2: ContextTokens .*got '-1'"),
            (f"{HEADER}\n0,1.5,2\n", "line 2: ContextTokens .*got '1.5'"),
            (f"{HEADER}\n0,{10**12},2\n", "line 2: ContextTokens"),
            (f"{HEADER}\nnan,1,2\n", "line 2: TIMESTAMP must be finite"),
            (f"{HEADER}\nyesterday,1,2\n", "line 2: TIMESTAMP is neither .*'yesterday'"),
            (f"{HEADER}\n0,1,2\n2023-11-16 18:15:48+01:00,1,2\n2023-11-16 18:15:48,1,x", "line 4: GeneratedTokens"),
        ],
    )
    def test_names_the_malformed_line(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "trace.csv"
        path.write_text(text)
        with pytest.raises(TraceError, match=message):
            read_requests(path)

    def test_missing_and_binary_files(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match=r"absent\.csv: cannot read the trace: No such file"):
            read_requests(tmp_path / "absent.csv")
        with pytest.raises(TraceError, match="cannot read the trace"):
            read_requests(tmp_path)
        (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(TraceError, match="not a CSV text file"):
            read_requests(tmp_path / "binary.csv")

    def test_draws_sizes_where_the_trace_is_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(serving_trace, "DEFAULT_TRACE", tmp_path / "absent.csv")
        trace = load_trace(None, 2000, seed=1)
        assert "DRAWN from the summary statistics" in trace.source
        assert trace.requests == draw_requests(2000, seed=1)
        contexts = [request.context_tokens for request in trace.requests]
        answers = [request.generated_tokens for request in trace.requests]
        assert np.median(contexts) == pytest.approx(1020, rel=0.1)
        assert np.median(answers) == pytest.approx(129, rel=0.1)
        assert min(contexts) >= 2
        assert max(answers) <= 1000
        arrivals = [request.arrival for request in trace.requests]
        assert arrivals[0] == 0.0
        assert arrivals == sorted(arrivals)

    def test_scales_sizes_and_arrivals(self) -> None:
        requests = (TraceRequest(0.0, 100, 0), TraceRequest(8.0, 3, 41))
        assert scale_requests(requests, 0.1, 4.0) == (TraceRequest(0.0, 10, 0), TraceRequest(2.0, 1, 4))
        assert [request.arrival for request in scale_requests(requests, 1.0, float("inf"))] == [0.0, 0.0]


class TestPagePool:
    @given(st.integers(0, 12), st.lists(st.integers(0, 5), max_size=30))
    def test_no_page_is_held_twice(self, num_pages: int, actions: list[int]) -> None:
        pool = PagePool(num_pages, page_size=4)
        held: list[list[int]] = []
        for action in actions:
            if action == 0 and held:
                pool.release(held.pop(0))
                continue
            pages = pool.allocate(action)
            assert (pages is None) == (action > num_pages - sum(map(len, held)))
            held += [pages] if pages else []
            everything = list(itertools.chain.from_iterable(held))
            assert len(set(everything)) == len(everything) == pool.num_used
            assert all(0 <= page < num_pages for page in everything)

    @pytest.mark.parametrize("page", [-1, 0, 4])
    def test_releasing_what_is_not_held_raises(self, page: int) -> None:
        pool = PagePool(4, page_size=4)
        pool.release(pool.allocate(4) or [])
        with pytest.raises(PoolError, match=f"page {page} was released but is not held"):
            pool.release([page])


def drive(scheduler: Scheduler, requests: Sequence[Request], steps_between_arrivals: int = 0) -> None:
    """Serve requests with made-up tokens, checking in each step what a model would rely on."""
    arriving = deque(requests)
    for step in itertools.count():
        while arriving and (not steps_between_arrivals or step >= requests.index(arriving[0]) * steps_between_arrivals):
            scheduler.submit(arriving.popleft())
        plan = scheduler.schedule()
        if plan is None:
            assert not scheduler.has_work
            if not arriving:
                return
            continue
        page_size = scheduler.pool.page_size
        owned = [page for request in scheduler.running for page in request.pages]
        assert len(owned) == len(set(owned)) == scheduler.pool.num_used
        assert all(not request.pages for request in scheduler.waiting)
        assert len(scheduler.running) <= scheduler.max_batch
        assert all(len(request.pages) * page_size >= request.num_tokens for request in plan.decodes)
        for chunk in plan.chunks:
            assert chunk.count >= 1
            assert chunk.start == chunk.request.num_cached
            assert len(chunk.request.pages) * page_size >= chunk.start + chunk.count
        assert len({span.request for span in plan.spans}) == len(plan.spans) <= len(scheduler.running)
        assert sum(span.count for span in plan.spans) <= scheduler.step_tokens
        rows = len(plan.spans)
        scheduler.complete(plan, [step] * rows, [0.0] * rows, now=float(step))


class TestScheduler:
    @given(
        sizes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 25)), max_size=12),
        num_pages=st.integers(1, 24),
        page_size=st.integers(1, 5),
        max_batch=st.integers(1, 5),
        prompt_tokens=st.integers(0, 16),
        pause=st.integers(0, 6),
    )
    def test_every_request_is_served_once_or_refused(
        self,
        sizes: list[tuple[int, int]],
        num_pages: int,
        page_size: int,
        max_batch: int,
        prompt_tokens: int,
        pause: int,
    ) -> None:
        pool = PagePool(num_pages, page_size)
        scheduler = Scheduler(pool, max_batch=max_batch, max_context=50, step_tokens=max_batch + prompt_tokens)
        requests = [make_request(index, *size) for index, size in enumerate(sizes)]
        drive(scheduler, requests, pause)
        check_books(requests, scheduler, unfinished=False)
        for request in requests:
            fits = len(request.prompt) + max(request.max_new_tokens - 1, 0) <= num_pages * page_size
            short = len(request.prompt) + request.max_new_tokens <= 50
            served = len(request.prompt) > 0 and fits and short
            assert request.state is (RequestState.SERVED if served else RequestState.REFUSED)
            assert bool(request.refusal) != served

    def test_prompts_share_the_steps(self) -> None:
        scheduler = Scheduler(PagePool(12, page_size=4), max_batch=3, max_context=20, step_tokens=8)
        for index in range(3):
            scheduler.submit(make_request(index, prompt=5, answer=4))
        steps = []
        for _ in range(3):
            plan = scheduler.schedule()
            assert plan is not None
            steps.append([(span.request.index, span.start, span.count) for span in plan.spans])
            scheduler.complete(plan, [0] * len(plan.spans), [0.0] * len(plan.spans), now=0.0)
        assert steps == [
            [(0, 0, 5), (1, 0, 3)],
            [(0, 5, 1), (1, 3, 2), (2, 0, 5)],
            [(0, 6, 1), (1, 5, 1), (2, 5, 1)],
        ]

    def test_exhausted_pool_preempts_the_latest(self) -> None:
        scheduler = Scheduler(PagePool(6, page_size=2), max_batch=4, max_context=100, step_tokens=8)
        requests = [make_request(0, prompt=3, answer=8), make_request(1, prompt=3, answer=8)]
        drive(scheduler, requests)
        assert requests[0].preemptions == 0
        assert requests[1].preemptions > 0
        assert scheduler.preemptions == requests[1].preemptions
        assert scheduler.dropped_tokens > 0
        check_books(requests, scheduler, unfinished=False)

    @pytest.mark.parametrize(
        ("prompt", "answer", "reason"),
        [
            (0, 3, "no prompt tokens"),
            (15, 6, "21 tokens, the longest context is 20"),
            (14, 4, "it needs 5 pages, the whole pool has 4"),
        ],
    )
    def test_refuses_what_can_never_be_served(self, prompt: int, answer: int, reason: str) -> None:
        scheduler = Scheduler(PagePool(4, page_size=4), max_batch=2, max_context=20, step_tokens=8)
        requests = [make_request(0, prompt, answer), make_request(1, prompt=13, answer=4)]
        drive(scheduler, requests)
        assert reason in requests[0].refusal
        assert requests[1].state is RequestState.SERVED

    def test_zero_tokens_to_generate_is_served_by_its_prompt(self) -> None:
        scheduler = Scheduler(PagePool(4, page_size=4), max_batch=2, max_context=20, step_tokens=8)
        requests = [make_request(0, prompt=16, answer=0)]
        drive(scheduler, requests)
        assert requests[0].state is RequestState.SERVED
        assert scheduler.computed_tokens == 16
        assert scheduler.generated_tokens == 0

    @pytest.mark.parametrize(
        ("falsify", "message"),
        [
            (
                lambda requests, scheduler: setattr(requests[0], "state", RequestState.WAITING),
                "2 submitted, but 1 served",
            ),
            (lambda requests, scheduler: setattr(requests[0], "times_served", 2), "request 0 was served 2 times"),
            (lambda requests, scheduler: requests[1].generated.pop(), "request 1 was served 1 times with 2 tokens"),
            (lambda requests, scheduler: setattr(scheduler, "generated_tokens", 7), "generated tokens: 7, but .*: 6"),
            (lambda requests, scheduler: setattr(scheduler, "dropped_tokens", 1), "computed tokens: 14, but .*: 15"),
            (lambda requests, scheduler: scheduler.pool.allocate(1), "pages in use: 1, but held by requests: 0"),
        ],
    )
    def test_false_books_are_noticed(self, falsify: Callable[[list[Request], Scheduler], object], message: str) -> None:
        scheduler = Scheduler(PagePool(8, page_size=4), max_batch=2, max_context=20, step_tokens=8)
        requests = [make_request(index, prompt=5, answer=3) for index in range(2)]
        drive(scheduler, requests)
        falsify(requests, scheduler)
        with pytest.raises(CheckError, match=message):
            check_books(requests, scheduler, unfinished=False)


@pytest.fixture(scope="module")
def replayed() -> tuple[Engine, Scheduler, list[Request], serving.Replay]:
    """A replay through a pool too small for its requests."""
    engine = Engine(
        TINY,
        pool_pages=14,
        page_size=4,
        max_batch=3,
        max_context=48,
        step_tokens=8,
        attention=AttentionChoice("unified", "auto"),
        seed=3,
    )
    engine.warm_up(lambda: None)
    scheduler = Scheduler(PagePool(14, page_size=4), max_batch=3, max_context=48, step_tokens=8)
    sizes = [(9, 14), (1, 20), (17, 1), (12, 12), (5, 0), (40, 20), (16, 9), (7, 15)]
    requests = [make_request(index, *size) for index, size in enumerate(sizes)]
    with Progress(disable=True) as progress, Compilations().watch() as compilations:
        replay = serving.run_replay(engine, scheduler, requests, progress)
    assert compilations.count == 0
    assert engine.compiled_steps == len(engine.shapes)
    return engine, scheduler, requests, replay


class TestReplay:
    def test_serves_the_tokens_of_a_dense_decoder(
        self, replayed: tuple[Engine, Scheduler, list[Request], serving.Replay]
    ) -> None:
        engine, scheduler, requests, replay = replayed
        assert scheduler.preemptions > 0
        assert max(sample.chunks for sample in replay.samples) > 1
        assert any(request.preemptions and request.state is RequestState.SERVED for request in requests)
        assert [request.index for request in requests if request.state is RequestState.REFUSED] == [5]
        for request in requests:
            if request.generated:
                alone = dense_greedy(engine, request)
                assert request.generated == alone

    def test_checks_pass_and_can_fail(
        self,
        replayed: tuple[Engine, Scheduler, list[Request], serving.Replay],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        engine, scheduler, requests, _ = replayed
        assert check_books(requests, scheduler, unfinished=False).passed
        assert serving_check.check_served_tokens(engine, requests, len(requests), Budget(1e9)).passed
        assert serving_check.check_step_attention(engine, 1e9).passed
        read_pages = engine.read_pages

        def read_other_values(*place: Any) -> tuple[Any, Any]:
            keys, values = read_pages(*place)
            return keys, 1.01 * values

        monkeypatch.setattr(engine, "read_pages", read_other_values)
        assert not serving_check.check_step_attention(engine, 1e9).passed
        preempted = max(requests, key=lambda request: request.preemptions)
        monkeypatch.setattr(preempted, "logits", [preempted.logits[0] + 0.1, *preempted.logits[1:]])
        assert not serving_check.check_served_tokens(engine, requests, 1, Budget(1e9)).passed

    def test_checks_keep_their_budget(self, replayed: tuple[Engine, Scheduler, list[Request], serving.Replay]) -> None:
        engine, _, requests, _ = replayed
        tokens = serving_check.check_served_tokens(engine, requests, len(requests), Budget(0))
        assert tokens.passed
        assert "1 of 6 parts of the sample" in tokens.detail
        attention = serving_check.check_step_attention(engine, 0)
        assert attention.passed
        assert len(re.findall(r"1 of \d+ parts", attention.detail)) == 2

    def test_padding_and_the_choice_of_operation_change_nothing(
        self, replayed: tuple[Engine, Scheduler, list[Request], serving.Replay]
    ) -> None:
        engine = replayed[0]
        requests = [make_request(index, prompt=9, answer=4) for index in range(2)]
        for request in requests:
            request.generated.append(7)
            request.num_cached, request.pages = 9, [3 * request.index + page for page in range(3)]
        inputs, shape = engine.build_inputs(StepPlan(tuple(requests), ()))
        assert (shape.sequences, shape.tokens) == (3, 3)
        random = np.random.default_rng(0)
        cache_shape = (engine.pool_pages, engine.page_size, TINY.kv_heads, TINY.head_dim)
        caches = Caches(*(random.standard_normal(cache_shape, np.float32) for _ in range(2)))
        queries = random.standard_normal((shape.tokens, TINY.heads, TINY.head_dim), np.float32)
        queries[2:] = np.nan
        unified, page = (
            attend_step(queries, caches, inputs, AttentionChoice(name, "xla")) for name in ("unified", "page")
        )
        np.testing.assert_allclose(unified, page, rtol=1e-5, atol=1e-6)
        assert not np.any(page[2:])
        of_jax = AttentionChoice("pallas", "xla")
        head_first = Caches(*(cache.transpose(["PTHD".index(axis) for axis in of_jax.kv_layout]) for cache in caches))
        np.testing.assert_allclose(attend_step(queries, head_first, inputs, of_jax)[:2], page[:2], rtol=1e-5, atol=1e-6)

    def test_kernel_in_the_interpreter(self, replayed: tuple[Engine, Scheduler, list[Request], serving.Replay]) -> None:
        check = serving_check.check_interpreted_kernel(replayed[0])
        assert check.passed, check.detail

    def test_interruption_keeps_the_books(self) -> None:
        class Interrupted:
            def __init__(self) -> None:
                self.steps = 0

            def run(self, plan: StepPlan) -> tuple[list[int], list[float]]:
                self.steps += 1
                if self.steps == 5:
                    raise KeyboardInterrupt
                return [0] * len(plan.spans), [0.0] * len(plan.spans)

        scheduler = Scheduler(PagePool(16, page_size=4), max_batch=2, max_context=40, step_tokens=8)
        requests = [make_request(index, prompt=10, answer=5) for index in range(3)]
        with Progress(disable=True) as progress:
            replay = serving.run_replay(Interrupted(), scheduler, requests, progress)
        assert replay.interrupted
        check = check_books(requests, scheduler, unfinished=True)
        assert "3 unfinished" in check.detail


def dense_greedy(engine: Engine, request: Request) -> list[int]:
    """The answer of a decoder that computes the whole sequence anew for each token."""
    tokens = request.prompt
    for _ in range(request.max_new_tokens):
        logits = dense_logits(engine.weights, engine.config, tokens, len(tokens) - 1, "float32")
        tokens = np.append(tokens, np.int32(logits[0].argmax()))
    return tokens[len(request.prompt) :].tolist()


class TestCommand:
    @pytest.fixture(autouse=True)
    def wide_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")

    @pytest.mark.parametrize("attention", ["unified", "pallas"])
    def test_runs_end_to_end(self, attention: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        trace = tmp_path / "trace.csv"
        trace.write_text("\n".join([HEADER, "0,40,12", "0.5,300,12", "1,28,0", "2,4,20"]))
        flags = (
            "--requests 4 --size-scale 0.5 --all-at-once --pool-pages 16 --page-size 4 --max-batch 1 --max-context 40 "
            "--step-tokens 1 --layers 1 --hidden 16 --heads 2 --kv-heads 1 --head-dim 8 --intermediate 16 "
            f"--vocabulary 32 --attention {attention}"
        )
        picture = tmp_path / "pictures" / "timeline.png"
        assert serving.main([*flags.split(), "--no-check", "--trace", str(trace), "--output", str(picture)]) == 0
        printed = capsys.readouterr().out
        assert "refused request 1: 156 tokens, the longest context is 40" in printed
        assert "4 submitted = 3 served + 1 refused; 16 tokens generated" in printed
        assert "0 during the" in printed
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_a_time_limit_ends_it_with_all_measures(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        flags = (
            "--requests 3 --all-at-once --pool-pages 64 --page-size 16 --max-batch 2 --max-context 800 --step-tokens 2 "
            "--layers 1 --hidden 16 --heads 2 --kv-heads 1 --head-dim 8 --intermediate 16 --vocabulary 32 --no-check "
            "--time-limit 0.01"
        )
        trace = tmp_path / "trace.csv"
        trace.write_text("\n".join([HEADER, "0,400,400", "0.5,400,400", "1,800,800"]))
        outputs = ("--trace", str(trace), "--output", str(tmp_path / "timeline.png"))
        assert serving.main([*flags.split(), *outputs]) == 0
        printed = capsys.readouterr().out
        assert re.search(r"3 submitted = 0 served \+ 0 refused \+ 3 unfinished; \d+ tokens generated", printed)
        assert "recorded steps timed again" in printed

    def test_wrong_trace_is_exit_status_2(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert serving.main(["--trace", str(tmp_path / "absent.csv")]) == serving.EXIT_USAGE
        assert "cannot read the trace" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--heads 6 --kv-heads 4", "must be a multiple of --kv-heads, got 6 and 4"),
            ("--step-tokens 8 --max-batch 9", "must be at least --max-batch, got 8 and 9"),
            ("--check-seconds 0", "must be a finite number above 0, got 0"),
            ("--attention prefill", "invalid choice"),
            ("--head-dim 7", "--head-dim must be even"),
            ("--requests 0", "must be at least 1, got 0"),
            ("--size-scale nan", "must be a finite number above 0, got nan"),
            ("--pool-pages 100000000", "below 2^31"),
            ("--output timeline.svg", "must name a .png file"),
            ("--platform tpu", "invalid choice"),
        ],
    )
    def test_wrong_flags(self, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            serving.parse_arguments(flags.split())
        assert message in capsys.readouterr().err
