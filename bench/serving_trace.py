"""Request sizes for the serving replay: read from a CSV of a production trace, or drawn like one."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
DEFAULT_TRACE = Path(__file__).resolve().parents[2] / "shared" / "traces" / "azure_llm_2023_conv.csv"

# Azure LLM inference trace 2023, conversation (19,366 requests): sizes at these shares of the requests.
QUANTILES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
CONTEXT_QUANTILES = (2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 2734, 4083, 4142, 14050)
GENERATED_QUANTILES = (7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 424, 451, 601, 1000)
MEAN_SECONDS_BETWEEN_ARRIVALS = 0.181


class TraceError(ValueError):
    """A trace file that is missing, empty or malformed."""


@dataclass(frozen=True)
class TraceRequest:
    """One request: seconds after the first one, prompt tokens, tokens to generate."""

    arrival: float
    context_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival, and a sentence that says where they come from."""

    requests: tuple[TraceRequest, ...]
    source: str


def load_trace(path: Path | None, count: int, seed: int) -> Trace:
    """The first `count` requests of the trace at `path`.

    Args:
        path: a CSV file; None takes the Azure trace where it lies beside the repository, and otherwise draws sizes from
            its statistics.
        count: at most this many requests.
        seed: for drawn sizes.

    Raises:
        TraceError: the file is missing, holds no request, or has a malformed line (named by number).
    """
    if path is None and not DEFAULT_TRACE.is_file():
        return Trace(
            draw_requests(count, seed),
            "sizes and arrivals DRAWN from the summary statistics of the Azure LLM inference trace 2023 "
            f"(conversation), not the trace itself: {DEFAULT_TRACE} does not exist",
        )
    path = DEFAULT_TRACE if path is None else path
    requests = read_requests(path, count)
    return Trace(requests, f"the first {len(requests)} requests of {path}")


def read_requests(path: Path, count: int | None = None) -> tuple[TraceRequest, ...]:
    """Read up to `count` requests from a CSV with the columns `TIMESTAMP,ContextTokens,GeneratedTokens`."""
    rows: list[tuple[float, int, int]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if not header:
                raise TraceError(f"{path}: the file is empty, expected a header line {','.join(COLUMNS)}")
            if missing := [name for name in COLUMNS if name not in header]:
                raise TraceError(f"{path}, line 1: no column {', '.join(missing)}, got {','.join(header)}")
            places = [header.index(name) for name in COLUMNS]
            for fields in reader:
                if count is not None and len(rows) >= count:
                    break
                if any(field.strip() for field in fields):
                    rows.append(_parse_row(fields, places, len(header), f"{path}, line {reader.line_num}"))
    except OSError as error:
        raise TraceError(f"{path}: cannot read the trace: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: not a CSV text file: {error}") from error
    if not rows and (count is None or count > 0):
        raise TraceError(f"{path}: the trace holds no requests")
    rows.sort(key=lambda row: row[0])
    return tuple(TraceRequest(seconds - rows[0][0], context, generated) for seconds, context, generated in rows)


def _parse_row(fields: Sequence[str], places: Sequence[int], width: int, where: str) -> tuple[float, int, int]:
    if len(fields) != width:
        raise TraceError(f"{where}: expected {width} fields, got {len(fields)}: {','.join(fields)[:80]!r}")
    timestamp, context, generated = (fields[place].strip() for place in places)
    return (
        _parse_timestamp(timestamp, where),
        _parse_count(context, "ContextTokens", where),
        _parse_count(generated, "GeneratedTokens", where),
    )


def _parse_timestamp(text: str, where: str) -> float:
    """Seconds, from a date with a time of day or from a plain number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise TraceError(
                f"{where}: TIMESTAMP is neither a date and time nor a number of seconds: {text!r}"
            ) from None
        # Differences are all that counts, so a time without a zone may be read in any fixed one.
        origin = datetime(2000, 1, 1, tzinfo=moment.tzinfo)
        return (moment - origin).total_seconds()
    if not math.isfinite(seconds):
        raise TraceError(f"{where}: TIMESTAMP must be finite, got {text!r}")
    return seconds


def _parse_count(text: str, column: str, where: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise TraceError(f"{where}: {column} must be a whole number from 0 to 999999999, got {text[:40]!r}")
    return int(text)


def draw_requests(count: int, seed: int) -> tuple[TraceRequest, ...]:
    """Requests whose sizes follow the quantiles above, each independent, with exponential gaps between arrivals."""
    generator = np.random.default_rng(seed)
    context, generated = (
        np.rint(np.interp(generator.random(count), QUANTILES, table)).astype(int)
        for table in (CONTEXT_QUANTILES, GENERATED_QUANTILES)
    )
    gaps = generator.exponential(MEAN_SECONDS_BETWEEN_ARRIVALS, count)
    arrivals = np.cumsum(gaps) - gaps[:1].sum()
    return tuple(
        TraceRequest(float(arrival), int(prompt), int(answer))
        for arrival, prompt, answer in zip(arrivals, context, generated, strict=True)
    )


def scale_requests(
    requests: Sequence[TraceRequest], size_scale: float, arrival_speed: float
) -> tuple[TraceRequest, ...]:
    """Multiply sizes by `size_scale` (0 stays 0, everything else keeps at least one token) and divide arrival times by
    `arrival_speed` (`inf`: everything arrives at once)."""
    return tuple(
        replace(
            request,
            arrival=request.arrival / arrival_speed,
            context_tokens=_scale_count(request.context_tokens, size_scale),
            generated_tokens=_scale_count(request.generated_tokens, size_scale),
        )
        for request in requests
    )


def _scale_count(tokens: int, scale: float) -> int:
    return max(1, round(tokens * scale)) if tokens else 0
