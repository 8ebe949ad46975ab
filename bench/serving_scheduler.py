"""Continuous batching over a paged pool: which tokens the next step computes, and which pages their K/V go to.

Every step decodes one token of each running sequence and spends what is left of its budget of tokens on chunks of
prompts, the first admitted first. A sequence that finds no free page preempts the latest admitted one, which gives up
its pages and later computes its tokens again (preemption by recomputation). Requests are admitted in order of arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt


class PoolError(RuntimeError):
    """A page given back that nobody holds: the books of the pool are wrong."""


class PagePool:
    """Free-list allocator over pages `0 .. num_pages - 1`."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._held = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, tokens: int) -> int:
        """How many pages `tokens` tokens of one sequence take."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, or None, and nothing taken, where fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._held[page] = 1
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Take pages back.

        Raises:
            PoolError: a page that is not held.
        """
        for page in pages:
            if not 0 <= page < self.num_pages or not self._held[page]:
                raise PoolError(f"page {page} was released but is not held (pool of {self.num_pages} pages)")
            self._held[page] = 0
            self._free.append(page)


class RequestState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    SERVED = "served"
    REFUSED = "refused"


@dataclass(eq=False)
class Request:
    """One request and everything that happened to it."""

    index: int
    arrival: float
    prompt: npt.NDArray[np.int32]
    max_new_tokens: int
    state: RequestState = RequestState.WAITING
    refusal: str = ""
    generated: list[int] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    preemptions: int = 0
    times_served: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def is_decoding(self) -> bool:
        """Only the newest token, just generated, is not in the cache yet."""
        return bool(self.generated) and self.num_cached == self.num_tokens - 1

    @property
    def tokens_to_compute(self) -> int:
        """Tokens that go through the model if nothing is computed twice: the last generated token never does."""
        return len(self.prompt) + max(self.max_new_tokens - 1, 0)

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Tokens `start .. stop - 1` of prompt and answer."""
        split = len(self.prompt)
        answer = self.generated[max(start - split, 0) : max(stop - split, 0)]
        return np.concatenate([self.prompt[start:stop], np.asarray(answer, np.int32)])


@dataclass(frozen=True)
class Chunk:
    """Tokens `[start, start + count)` of a sequence."""

    request: Request
    start: int
    count: int

    @property
    def finishes(self) -> bool:
        return self.start + self.count == self.request.num_tokens


@dataclass(frozen=True)
class StepPlan:
    """What one step computes: one token of each of `decodes`, and `chunks` of prompts."""

    decodes: tuple[Request, ...]
    chunks: tuple[Chunk, ...]

    @property
    def spans(self) -> tuple[Chunk, ...]:
        """The tokens of every sequence, a decoded one being a chunk of one token, in the order of the results."""
        return (*(Chunk(request, request.num_tokens - 1, 1) for request in self.decodes), *self.chunks)

    @property
    def prompt_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


class Scheduler:
    """Admission, chunking, preemption and the books of one replay.

    A step computes up to `step_tokens` tokens, which are enough for one of each of `max_batch` sequences.
    """

    def __init__(self, pool: PagePool, *, max_batch: int, max_context: int, step_tokens: int) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.max_context = max_context
        self.step_tokens = step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.preemptions = 0
        self.dropped_tokens = 0
        self.computed_tokens = 0
        self.generated_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> bool:
        """Queue a request, or refuse one that can never be served: False, and the reason in `request.refusal`."""
        request.refusal = self._refusal(request)
        if request.refusal:
            request.state = RequestState.REFUSED
            return False
        self.waiting.append(request)
        return True

    def _refusal(self, request: Request) -> str:
        length = len(request.prompt) + request.max_new_tokens
        pages = self.pool.pages_for(request.tokens_to_compute)
        if not len(request.prompt):
            return "it has no prompt tokens to start from"
        if length > self.max_context:
            return f"{length} tokens, the longest context is {self.max_context}"
        if pages > self.pool.num_pages:
            return f"it needs {pages} pages, the whole pool has {self.pool.num_pages}"
        return ""

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None where nothing is queued or running."""
        preempted = self._grow_decoding_sequences()
        decodes = tuple(request for request in self.running if request.is_decoding)
        prefilling = deque(request for request in self.running if not request.is_decoding)
        chunks: list[Chunk] = []
        budget = self.step_tokens - len(decodes)
        while budget > 0:
            if not prefilling and not preempted and (admitted := self._admit()):
                prefilling.append(admitted)
            if not prefilling:
                break
            request = prefilling.popleft()
            chunk = Chunk(request, request.num_cached, min(budget, request.num_tokens - request.num_cached))
            chunks.append(chunk)
            budget -= chunk.count
        return StepPlan(decodes, tuple(chunks)) if decodes or chunks else None

    def _grow_decoding_sequences(self) -> bool:
        """See that every decoding sequence has a page for its next token, the oldest first; answer whether that took
        preemption."""
        before = self.preemptions
        for request in list(self.running):
            if not request.is_decoding or request.state is not RequestState.RUNNING:
                continue
            missing = self.pool.pages_for(request.num_tokens) - len(request.pages)
            while (pages := self.pool.allocate(missing)) is None:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    break
            else:
                request.pages.extend(pages)
        return self.preemptions > before

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.preemptions += 1
        self.dropped_tokens += request.num_cached
        request.preemptions += 1
        request.num_cached = 0
        request.state = RequestState.WAITING
        self.waiting.appendleft(request)

    def _admit(self) -> Request | None:
        """Admit the head of the queue with pages for all tokens it has so far.

        Beside running sequences one more page stays free, or the newcomer would be preempted by their next token.
        """
        if not self.waiting or len(self.running) >= self.max_batch:
            return None
        needed = self.pool.pages_for(self.waiting[0].num_tokens)
        if self.running and needed + 1 > self.pool.num_free:
            return None
        pages = self.pool.allocate(needed)
        if pages is None:
            return None
        request = self.waiting.popleft()
        request.pages.extend(pages)
        request.state = RequestState.RUNNING
        self.running.append(request)
        return request

    def complete(self, plan: StepPlan, tokens: Sequence[int], logits: Sequence[float], now: float) -> int:
        """Enter the results of a step: one token (and its logit) for each of `plan.spans`.

        Returns:
            How many tokens were generated; the token after a chunk counts only where the chunk ends its prompt.
        """
        before = self.generated_tokens
        for span, token, logit in zip(plan.spans, tokens, logits, strict=True):
            request = span.request
            finishes = span.finishes
            request.num_cached += span.count
            self.computed_tokens += span.count
            if finishes and request.max_new_tokens:
                self._append(request, token, logit, now)
            elif finishes:
                self._finish(request)
        return self.generated_tokens - before

    def _append(self, request: Request, token: int, logit: float, now: float) -> None:
        request.generated.append(int(token))
        request.logits.append(float(logit))
        request.token_times.append(now)
        self.generated_tokens += 1
        if len(request.generated) == request.max_new_tokens:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.state = RequestState.SERVED
        request.times_served += 1

    def _release(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages.clear()
