"""Checks of arguments while tracing: each error names the operation, the argument, what was expected and what came."""

import math
import numbers
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_bridge.layouts import LAYOUTS

DEFAULT_MASK_VALUE = -2.381976426469702e38

# Bounds beyond every length, small enough that positions plus or minus a bound stay inside int32.
_LARGEST_WINDOW = 2**30

# Scores over a cap between them, and the cap in base 2, are normal float32 numbers. A larger one changes no score below
# 1e32, and a smaller one leaves nothing of any.
_LARGEST_CAP, _SMALLEST_CAP = 1e36, 1e-30
_INT32 = np.iinfo(np.int32)


class DtypeRule(NamedTuple):
    """A set of dtypes and the words for it; an empty set of `names` means a whole `kind` of dtypes."""

    expected: str
    dtypes: frozenset[np.dtype]
    kind: Any = None

    def accepts(self, dtype: Any) -> bool:
        """Whether arrays of `dtype` pass, after JAX's own narrowing of 64-bit types."""
        if dtype in self.dtypes:
            return True
        try:
            narrowed = jax.dtypes.canonicalize_dtype(dtype)
        except (TypeError, ValueError):  # the latter of random keys
            return False
        return narrowed in self.dtypes or (self.kind is not None and jnp.issubdtype(narrowed, self.kind))


def _rule(*names: str) -> DtypeRule:
    return DtypeRule(", ".join(names), frozenset(jnp.dtype(name) for name in names))


FLOAT = _rule("float32", "float16", "bfloat16")
QUANTISED = _rule("float8_e4m3fn", "float8_e5m2", "int8")
CACHE = DtypeRule(f"{FLOAT.expected}, {QUANTISED.expected}", FLOAT.dtypes | QUANTISED.dtypes)
INDEX = DtypeRule("an integer dtype", frozenset({jnp.dtype("int32")}), jnp.integer)
ANY_FLOAT = DtypeRule("a floating dtype", FLOAT.dtypes, jnp.floating)
BOOLEAN = _rule("bool")

Axes = tuple[str, ...]
Window = tuple[int, int | None]


@dataclass(frozen=True)
class PagedSizes:
    """Sizes of one call of a paged operation.

    Attributes:
        num_seqs: sequences `S`; 1 for prefill.
        num_tokens: rows of the query.
        num_q_heads: query heads `Hq`.
        num_kv_heads: KV heads `Hkv`.
        group_size: query heads that share a KV head, `Hq // Hkv`.
        head_dim: width `D` of queries and keys.
        value_head_dim: width `Dv` of values.
        num_pages: pages `P` of the cache.
        page_size: tokens a page, `ps`.
        table_width: entries of the page table a sequence, `MP`.
    """

    num_seqs: int
    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    value_head_dim: int
    num_pages: int
    page_size: int
    table_width: int


@dataclass(frozen=True)
class PagedOptions:
    """Static arguments that the paged operations share, normalised.

    Attributes:
        softmax_scale: factor on the scores.
        soft_cap: None for off, never 0.
        window: bounds `(left, right)` of the visible keys, `i - left <= j <= i + right`; None as right bound for open.
        kv_layout: order of the cache's axes.
        return_lse: whether the LSE is answered too.
    """

    softmax_scale: float
    soft_cap: float | None
    window: Window | None
    kv_layout: str
    return_lse: bool


def paged_outputs(sizes: PagedSizes, options: PagedOptions, dtype: Any) -> Any:
    """What a paged operation answers: the output, and the LSE if asked for."""
    rows = (sizes.num_tokens, sizes.num_q_heads)
    out = jax.ShapeDtypeStruct((*rows, sizes.value_head_dim), dtype)
    return (out, jax.ShapeDtypeStruct(rows, jnp.float32)) if options.return_lse else out


def describe(value: Any) -> str:
    """Words for what came in place of something else."""
    if isinstance(value, jax.core.Tracer):
        return f"a traced value {value.aval.str_short()}"
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{value!r} of type {type(value).__name__}"


def brackets(axes: Axes) -> str:
    """`("S", "Hq")` -> `"[S, Hq]"`."""
    return f"[{', '.join(axes)}]"


_listed: ContextVar[list[Exception] | None] = ContextVar("listed", default=None)


@contextmanager
def listed_errors() -> Iterator[list[Exception]]:
    """Arguments that do not fit put their errors into a list instead of raising the first; what uses them may fail."""
    errors: list[Exception] = []
    token = _listed.set(errors)
    try:
        yield errors
    finally:
        _listed.reset(token)


def listing(check: Callable[..., Any], operation: str, errors: list[Exception]) -> Callable[..., Any]:
    """`check` that puts its error in the common wording into `errors`, and then answers what it was given to check."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return check(*args, **kwargs)
        except Exception as error:
            if str(error).startswith(f"{operation}: "):
                errors.append(error)
            elif not errors:  # else it comes of going on without what was refused
                raise
            return args[1] if len(args) > 1 else None

    return checked


_LISTED_CHECKS = (
    "array",
    "length",
    "caches",
    "values",
    "same_dtype",
    "query_matches_cache",
    "not_empty",
    "heads",
    "kv_scale",
    "sinks",
    "layout",
    "scale",
    "soft_cap",
    "window",
    "flag",
    "optional_integer",
    "mask_value",
    "choice",
    "number",
    "by",
)


class Arguments:
    """Checks the arguments of one call and keeps the size that each named axis was found to have."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.sizes: dict[str, int] = {}
        self._sources: dict[str, str] = {}
        self._axes: dict[str, Axes] = {}
        errors = _listed.get()
        if errors is not None:
            for name in _LISTED_CHECKS:
                setattr(self, name, listing(getattr(self, name), operation, errors))

    def type_error(self, argument: str, got: str, expected: str) -> TypeError:
        """A `TypeError` in the common wording."""
        return TypeError(f"{self.operation}: {argument} {got}, expected {expected}")

    def value_error(self, argument: str, got: str, expected: str) -> ValueError:
        """A `ValueError` in the common wording."""
        return ValueError(f"{self.operation}: {argument} {got}, expected {expected}")

    # Arrays

    def array(self, argument: str, value: Any, axes: Axes, rule: DtypeRule) -> Any:
        """Check dtype, rank and sizes of an array; an axis seen before must have the size seen before."""
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if shape is None or dtype is None:
            raise self.type_error(argument, f"is {describe(value)}", f"an array {brackets(axes)}")
        if not rule.accepts(dtype):
            if len(shape) == len(axes):  # where errors are listed, the other arrays are still held to its sizes
                self.sizes = dict(zip(axes, shape, strict=True)) | self.sizes
                self._sources = dict.fromkeys(axes, argument) | self._sources
            raise self.type_error(argument, f"has dtype {dtype}", rule.expected)
        if len(shape) != len(axes):
            count = f"{len(axes)} {'axis' if len(axes) == 1 else 'axes'}"
            raise self.value_error(argument, f"has shape {tuple(shape)}", f"{count} {brackets(axes)}")
        self._axes[argument] = axes
        for axis, size in zip(axes, shape, strict=True):
            known = self.sizes.setdefault(axis, size)
            if known != size:
                where = f"{brackets(axes)} with {axis} = {known} as in {self._sources[axis]}"
                raise self.value_error(argument, f"has shape {tuple(shape)}", where)
            self._sources.setdefault(axis, argument)
        return value

    def index(self, argument: str, value: Any, axes: Axes) -> Any:
        """Check an integer array; a numpy array of 64-bit integers is narrowed here, before JAX would wrap it round."""
        checked = self.array(argument, value, axes, INDEX)
        return narrowed(checked) if _listed.get() is None else checked  # what lists problems shows values as they came

    def optional(self, argument: str, value: Any, axes: Axes, rule: DtypeRule = ANY_FLOAT) -> Any:
        """As `array`, where None stands for absent."""
        return None if value is None else self.array(argument, value, axes, rule)

    def known(self, axis: str, size: int, source: str) -> None:
        """Fix the size of an axis that another argument implies."""
        self.sizes[axis], self._sources[axis] = size, source

    def length(self, argument: str, value: Any) -> Any:
        """Check one length: an integer, or an integer array `[]` or `[1]`."""
        if isinstance(value, int) and not isinstance(value, bool):
            clipped = np.asarray([min(max(value, _INT32.min), _INT32.max)], np.int32)
            return clipped if _listed.get() is None else np.asarray([value], object)
        shape = getattr(value, "shape", None)
        if shape is None:
            raise self.type_error(argument, f"is {describe(value)}", "an integer or an array: a scalar or [1]")
        if shape not in ((), (1,)):
            raise self.value_error(argument, f"has shape {tuple(shape)}", "a scalar or [1]")
        return self.index(argument, value, ("1",) * len(shape))

    def layout(self, kv_layout: Any) -> str:
        """Check the name of a cache layout."""
        if kv_layout not in LAYOUTS:
            raise self.value_error("kv_layout", f"is {kv_layout!r}", f"one of {', '.join(LAYOUTS)}")
        return str(kv_layout)

    def caches(self, key_cache: Any, value_cache: Any, kv_layout: str, *, same_width: bool) -> None:
        """Check both caches: one dtype, no empty axis besides the pages, and `Dv == D` where `same_width` says so."""
        letters = {"P": "P", "T": "ps", "H": "Hkv", "D": "D"}
        axes = tuple(letters[letter] for letter in kv_layout)
        self.array("key_cache", key_cache, axes, CACHE)
        value_axes = tuple("Dv" if axis == "D" else axis for axis in axes)
        self.values("value_cache", value_cache, value_axes, CACHE, same_width=same_width)
        self.same_dtype("value_cache", value_cache, "key_cache", key_cache)
        self.not_empty("ps", "Hkv", "D", "Dv")

    def not_empty(self, *axes: str) -> None:
        """Check that axes of checked arrays are not empty."""
        for axis in axes:
            if self.sizes[axis] < 1:
                source = self._sources[axis]
                raise self.value_error(source, f"has {axis} = 0 in {brackets(self._axes[source])}", f"{axis} >= 1")

    def values(self, argument: str, value: Any, axes: Axes, rule: DtypeRule, *, same_width: bool) -> None:
        """Check a value array, whose last axis `Dv` must equal `D` in the operations with one head width."""
        self.array(argument, value, axes, rule)
        if same_width and self.sizes["Dv"] != self.sizes["D"]:
            expected = f"{brackets(axes)} with Dv = D = {self.sizes['D']} as in {self._sources['D']}"
            raise self.value_error(argument, f"has shape {tuple(value.shape)}", expected)

    def same_dtype(self, argument: str, value: Any, other_argument: str, other: Any) -> None:
        """Check that two arrays share their dtype."""
        if not _same_dtype(value, other):
            raise self.value_error(argument, f"has dtype {value.dtype}", f"{other.dtype} as in {other_argument}")

    def query_matches_cache(self, argument: str, query: Any, key_cache: Any) -> None:
        """Check that the query has the dtype of an unquantised cache."""
        if key_cache.dtype not in QUANTISED.dtypes and not _same_dtype(query, key_cache):
            expected = f"{query.dtype} as in {argument}, or {QUANTISED.expected}"
            raise self.value_error("key_cache", f"has dtype {key_cache.dtype}", expected)

    def heads(self, argument: str) -> int:
        """Check that the query heads are a multiple of the KV heads; answers how many share one."""
        num_q_heads, num_kv_heads = self.sizes["Hq"], self.sizes["Hkv"]
        if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads:
            raise self.value_error(argument, f"has {num_q_heads} heads", f"a multiple of the {num_kv_heads} KV heads")
        return num_q_heads // num_kv_heads

    def kv_scale(self, argument: str, value: Any) -> Any:
        """Check a cache's scale: None, a number, an array of one element, or one element a KV head."""
        if value is None:
            return None
        if _is_number(value):
            return np.asarray([value], np.float32)
        shape = tuple(getattr(value, "shape", (-1,)))
        num_kv_heads = self.sizes["Hkv"]
        expected = f"a number or an array [1] or [Hkv] with Hkv = {num_kv_heads}"
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise self.type_error(argument, f"is {describe(value)}", expected)
        if not ANY_FLOAT.accepts(value.dtype) and not INDEX.accepts(value.dtype):
            raise self.type_error(argument, f"has dtype {value.dtype}", "a floating or integer dtype")
        if shape not in ((), (1,), (num_kv_heads,)):
            raise self.value_error(argument, f"has shape {shape}", expected)
        return value

    def sinks(self, argument: str, value: Any, rule: DtypeRule) -> Any:
        """Check sink logits: None, `[n]`, or `[Hq, n]`."""
        if value is None:
            return None
        shape, expected = getattr(value, "shape", None), "[n] or [Hq, n]"
        if shape is None:
            raise self.type_error(argument, f"is {describe(value)}", f"an array {expected}")
        if len(shape) not in (1, 2):
            raise self.value_error(argument, f"has shape {tuple(shape)}", expected)
        return self.array(argument, value, ("n",) if len(shape) == 1 else ("Hq", "n"), rule)

    def paged_sizes(self, num_seqs: str | int, num_tokens: str) -> PagedSizes:
        """The sizes of a paged call, once every array has been checked."""
        sizes = self.sizes
        return PagedSizes(
            num_seqs=num_seqs if isinstance(num_seqs, int) else sizes[num_seqs],
            num_tokens=sizes[num_tokens],
            num_q_heads=sizes["Hq"],
            num_kv_heads=sizes["Hkv"],
            group_size=sizes["Hq"] // sizes["Hkv"],
            head_dim=sizes["D"],
            value_head_dim=sizes["Dv"],
            num_pages=sizes["P"],
            page_size=sizes["ps"],
            table_width=sizes["MP"],
        )

    def by(self, argument: str, value: Any, check: Callable[["Arguments", str, Any], Any]) -> Any:
        """Check a value by a rule of the operation's own, which raises in the common wording."""
        return check(self, argument, value)

    # Static values

    def number(self, argument: str, value: Any, *, minimum: float = -math.inf, below: float = math.inf) -> float:
        """Check a static, finite number with `minimum <= value < below`."""
        bounds = f" >= {minimum:g}" if minimum > -math.inf else ""
        bounds += f" and < {below:g}" if below < math.inf else ""
        self._refuse_array(argument, value, f"a finite Python number{bounds}")
        if not _is_number(value):
            raise self.type_error(argument, f"is {describe(value)}", f"a finite Python number{bounds}")
        result = float(value)
        if not math.isfinite(result) or not minimum <= result < below:
            raise self.value_error(argument, f"is {value!r}", f"a finite number{bounds}")
        return result

    def integer(self, argument: str, value: Any, *, minimum: int) -> int:
        """Check a static integer."""
        self._refuse_array(argument, value, f"a Python integer >= {minimum}")
        if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
            raise self.type_error(argument, f"is {describe(value)}", f"a Python integer >= {minimum}")
        result = operator.index(value)
        if result < minimum:
            raise self.value_error(argument, f"is {result}", f"an integer >= {minimum}")
        return result

    def optional_integer(self, argument: str, value: Any, *, minimum: int) -> int | None:
        """As `integer`, where None stands for absent."""
        return None if value is None else self.integer(argument, value, minimum=minimum)

    def mask_value(self, argument: str, value: Any) -> None:
        """Check a score for masked keys, which no result depends on: any number that is one."""
        self._refuse_array(argument, value, "a Python number")
        if not _is_number(value):
            raise self.type_error(argument, f"is {describe(value)}", "a Python number")

    def flag(self, argument: str, value: Any) -> bool:
        """Check a static boolean."""
        self._refuse_array(argument, value, "a Python bool")
        if not isinstance(value, (bool, np.bool_)):
            raise self.type_error(argument, f"is {describe(value)}", "a Python bool")
        return bool(value)

    def scale(self, argument: str, value: Any) -> float:
        """Check the factor on the scores; None is `1 / sqrt(D)`."""
        return self.sizes["D"] ** -0.5 if value is None else self.number(argument, value)

    def soft_cap(self, argument: str, value: Any) -> float | None:
        """Check a soft cap; 0 is off, like None, and so is one near the end of float32."""
        cap = 0.0 if value is None else self.number(argument, value, minimum=0.0)
        if cap == 0.0 or cap > _LARGEST_CAP:
            return None
        return max(cap, _SMALLEST_CAP)

    def window(self, argument: str, value: Any, *, from_width: str, right: int | None) -> Window | None:
        """Check a window and answer the bounds `(left, right)`: keys `i - left <= j <= i + right`.

        Args:
            argument: the argument's name.
            value: None, an int `W`, or a pair of integers >= 0.
            from_width: what an int means: `"width"` is `(W - 1, right)`, `"radius"` is `(W, W)`.
            right: the right bound that the operation itself sets (0 when causal), None for none.
        """
        if value is None:
            return None
        expected = "None, an integer >= 1 or a pair of integers >= 0"
        self._refuse_array(argument, value, expected)
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != 2:
                raise self.value_error(argument, f"is {value!r}", expected)
            bounds = [self.integer(f"{argument}[{side}]", bound, minimum=0) for side, bound in enumerate(value)]
            left, given_right = (min(bound, _LARGEST_WINDOW) for bound in bounds)
            return left, given_right if right is None else min(right, given_right)
        width = min(self.integer(argument, value, minimum=1), _LARGEST_WINDOW)
        if from_width == "radius":
            return width, width if right is None else right
        return width - 1, right

    def choice(self, argument: str, value: Any, choices: tuple[str, ...]) -> None:
        """Check an optional word; None is always accepted."""
        if value is not None and (not isinstance(value, str) or value not in choices):
            raise self.value_error(argument, f"is {value!r}", f"None or one of {', '.join(choices)}")

    def _refuse_array(self, argument: str, value: Any, expected: str) -> None:
        if isinstance(value, (jax.Array, np.ndarray)):
            reason = "it is static: close over it, or mark it with static_argnames"
            raise self.type_error(argument, f"is {describe(value)}", f"{expected} ({reason})")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _same_dtype(left: Any, right: Any) -> bool:
    if left.dtype == right.dtype:
        return True
    return bool(jax.dtypes.canonicalize_dtype(left.dtype) == jax.dtypes.canonicalize_dtype(right.dtype))


def narrowed(value: Any) -> Any:
    """A numpy array of 64-bit integers as int32, clipped; anything else as it is."""
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.itemsize == 8 and value.dtype.kind in "iu":
        return np.clip(value, max(_INT32.min, np.iinfo(value.dtype).min), _INT32.max).astype(np.int32)
    return value


def to_int32(value: jax.Array) -> jax.Array:
    """An integer array as int32; values that do not fit are clipped, so that they stay out of range."""
    if value.dtype == jnp.int32:
        return value
    info = jnp.iinfo(value.dtype)
    if info.max > _INT32.max:
        value = jnp.clip(value, max(int(info.min), int(_INT32.min)), int(_INT32.max))
    return value.astype(jnp.int32)
