"""Calls of operations from the shell: sizes by the letters of docs/semantics.md to arguments without contents."""

import argparse
import ast
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_bridge import launch, tuned_configs
from jax_bridge.device import KNOWN_DEVICES, TARGET_VARIABLE, current_device
from jax_bridge.explanation import explain
from jax_bridge.operation import INDEX_ARGUMENTS
from jax_bridge.registry import OPERATIONS
from jax_bridge.tuning import tuned

Parsed = tuple[list[Any], dict[str, Any]]

SIZES = {"S": 64, "T": 64, "B": 64, "C": 2048, "Q": 2048, "K": 2048, "L": 4096, "MP": 256, "ps": 16} | {
    "Hq": 32,
    "Hkv": 8,
    "D": 128,
}
"""What letters stand for that are not given: Llama 3 8B, decoding or prefilling."""

_CACHE = {"P": "P", "T": "ps", "H": "Hkv", "D": "D"}
_CACHES = {"key_cache": ("cache", "D"), "value_cache": ("cache", "Dv")}
_POSITIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "page_attention": {"query": ("S", "Hq", "D"), **_CACHES, "context_lens": ("S",), "block_tables": ("S", "MP")},
    "prefill_page_attention": {"query": ("C", "Hq", "D"), **_CACHES, "context_len": ("1",), "page_indices": ("MP",)},
    "unified_attention": {
        "queries": ("T", "Hq", "D"),
        **_CACHES,
        "kv_lens": ("S",),
        "block_tables": ("S", "MP"),
        "query_start_loc": ("S + 1",),
    },
    "ragged_decode_attention": {
        "query": ("B", "Hq", "D"),
        "key": ("B", "L", "Hkv", "D"),
        "value": ("B", "L", "Hkv", "Dv"),
        "sequence_start": ("B",),
        "sequence_end": ("B",),
    },
    "attention": {"query": ("B", "Q", "Hq", "D"), "key": ("B", "K", "Hkv", "D"), "value": ("B", "K", "Hkv", "Dv")},
    "write_kv_pages": {"key": ("T", "Hkv", "D"), "value": ("T", "Hkv", "Dv"), **_CACHES, "slot_mapping": ("T",)},
    "merge_attention_states": {
        "out_a": ("T", "Hq", "D"),
        "lse_a": ("T", "Hq"),
        "out_b": ("T", "Hq", "D"),
        "lse_b": ("T", "Hq"),
    },
}
_LAYOUTS = {"page_attention": "PHTD", "prefill_page_attention": "HPTD"}
_OPTIONAL = {
    "attention_sink": ("Hq",),
    "alibi_slopes": ("Hq",),
    "k_scale": ("Hkv",),
    "v_scale": ("Hkv",),
    "qq_bias": ("T", "T"),
}


def tune_command(arguments: Sequence[str] | None = None) -> int:
    """`python -m jax_bridge.tune`; 0, or 2 where the arguments are wrong."""
    parser = _parser("tune", "Time the candidate configurations of a call here, and keep the best for later processes.")
    return _finish(
        parser, arguments, lambda call, op, platform: print(tuned(op, *call[0], platform=platform, **call[1]))
    )


def explain_command(arguments: Sequence[str] | None = None) -> int:
    """`python -m jax_bridge.explain`; 0, or 2 where the arguments are wrong."""
    parser = _parser("explain", "Say what this machine has, and which platform and configuration a call takes on it.")

    def show(call: Parsed, op: str, platform: str | None) -> None:
        print(explain(op, *call[0], platform=platform, **call[1]))

    return _finish(parser, arguments, show, introduce=lambda: print(machine(), end="\n\n"))


def machine() -> str:
    """What decides the choices of this process, a line each."""
    device = current_device()
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in tuned_configs.versions().items())
    folder = tuned_configs.directory()
    files = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.json"))
    kernels = "in Triton's interpreter" if launch.interpreting() else f"for {device.name}"
    memory = f"{device.shared_memory // 1024} KiB of shared memory a program"
    return "\n".join(
        (
            f"devices: {', '.join(f'{d.platform}:{d.id} {d.device_kind}' for d in jax.devices())}",
            f"versions: {versions}",
            f"Triton kernels: {kernels}, {device.architecture}, {device.num_sms} multiprocessors, {memory}",
            f"policy: {tuned_configs.policy()} ({tuned_configs.POLICY_VARIABLE})",
            f"tuned configurations: {folder} ({', '.join(files) or 'none'})",
        )
    )


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    sizes = " ".join(f"{letter}={size}" for letter, size in SIZES.items())
    parser = argparse.ArgumentParser(
        prog=f"python -m jax_bridge.{name}",
        description=description,
        epilog=f"Sizes left out: {sizes} Dv=D P=S*MP. {TARGET_VARIABLE} ({', '.join(KNOWN_DEVICES)}) names the "
        "GPU to specialise for where there is none.",
    )
    every = "every operation" if name == "explain" else None
    parser.add_argument("--op", choices=list(OPERATIONS), required=every is None, help=every and f"default: {every}")
    parser.add_argument("--shape", nargs="+", default=[], metavar="LETTER=SIZE", help="sizes, as in S=8 MP=512 D=64")
    parser.add_argument("--dtype", default="bfloat16", help="of queries, and of keys and values; default: bfloat16")
    parser.add_argument("--cache-dtype", help="of the caches, if another")
    parser.add_argument("--array", nargs="+", default=[], choices=list(_OPTIONAL), help="optional arrays to give")
    parser.add_argument(
        "--option",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="static arguments, as in sliding_window=1024 kv_layout=PTHD causal=True",
    )
    parser.add_argument("--platform", help="as in the call")
    return parser


def _finish(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    act: Callable[[Parsed, str, str | None], None],
    introduce: Callable[[], None] = lambda: None,
) -> int:
    given = parser.parse_args(arguments)
    if not given.op and (given.array or given.option):
        parser.error("--array and --option belong to one operation, expected --op")
    try:
        introduce()
        for op in [given.op] if given.op else OPERATIONS:
            act(parsed_call(op, given), op, given.platform)
    except (TypeError, ValueError, NotImplementedError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def parsed_call(op: str, given: argparse.Namespace) -> Parsed:
    """The arguments of a call of `op` that the command line describes: shapes, optional arrays and static options.

    Raises:
        ValueError: a letter, a size or an option that cannot be read.
    """
    sizes = dict(SIZES)
    for letter, text in _pairs("--shape", given.shape):
        if letter not in {*SIZES, "Dv", "P"} or not text.isdigit():
            raise ValueError(f"--shape has {letter}={text}, expected {', '.join([*SIZES, 'Dv', 'P'])} and an integer")
        sizes[letter] = int(text)
    sizes = {"Dv": sizes["D"], "P": sizes["S"] * sizes["MP"], **sizes, "1": 1, "S + 1": sizes["S"] + 1}
    options = {name: _value(text) for name, text in _pairs("--option", given.option)}
    if op == "attention":
        options.setdefault("dtype", None)  # computed as given, not in bfloat16
    layout = str(options.get("kv_layout", _LAYOUTS.get(op, "PTHD")))
    dtypes = {"key_cache": given.cache_dtype or given.dtype, "value_cache": given.cache_dtype or given.dtype}
    arrays = []
    for name, letters in _POSITIONAL[op].items():
        if letters[0] == "cache":
            letters = tuple(letters[1] if axis == "D" else _CACHE.get(axis, "P") for axis in layout)
        is_index = name in INDEX_ARGUMENTS
        dtype = "int32" if is_index else "float32" if name.startswith("lse") else dtypes.get(name, given.dtype)
        arrays.append(jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in letters), jnp.dtype(dtype)))
    for name in given.array:
        options[name] = jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in _OPTIONAL[name]), jnp.float32)
    return arrays, options


def _pairs(flag: str, entries: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [entry.partition("=") for text in entries for entry in _split(flag, text)]
    if wrong := [name + sign + value for name, sign, value in pairs if not (name and value)]:
        raise ValueError(f"{flag} has {wrong[0]!r}, expected NAME=VALUE")
    return [(name, value) for name, _, value in pairs]


def _split(flag: str, text: str) -> list[str]:
    return [part for part in text.split(",") if part] if flag == "--shape" else [text]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text  # a name, as of a layout or a dtype
