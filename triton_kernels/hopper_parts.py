"""What the warps of the kernel for Hopper tell each other: which part of which row tile comes next, and which slot."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

WARPS = tl.constexpr(4)  # of a warpgroup
PARTS = tl.constexpr(2)  # announced but not begun
FIELDS = tl.constexpr(10)  # of a part


@gluon.jit
def place(number, RING: gl.constexpr):
    """The slot of a ring that tile `number` goes through, and the parity of its barriers."""
    return number % RING, number // RING & 1


@gluon.jit
def announce(part, ring, full, empty, fields):
    """Tell the warpgroups about part number `part`: once they have read the one whose place it takes.

    The fields are, in order, the names that `read_part` gives them.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    slot, parity = place(part, PARTS)
    mbarrier.wait(empty.index(slot), parity ^ 1)
    for number in gl.static_range(FIELDS):
        ring.index(slot * FIELDS + number).store(gl.full([1], fields[number], gl.int32, layout))
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def read_field(ring, place_in_ring):
    """A number that `announce` has put into a place of the ring."""
    return gl.max(ring.index(place_in_ring).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def read_part(part, ring, full, empty):
    """What `announce` tells of part number `part`."""
    slot, parity = place(part, PARTS)
    mbarrier.wait(full.index(slot), parity)
    num_tiles = read_field(ring, slot * FIELDS)
    begin = read_field(ring, slot * FIELDS + 1)
    key_begin = read_field(ring, slot * FIELDS + 2)
    key_end = read_field(ring, slot * FIELDS + 3)
    first_token = read_field(ring, slot * FIELDS + 4)
    num_tokens = read_field(ring, slot * FIELDS + 5)
    num_keys = read_field(ring, slot * FIELDS + 6)
    first_row = read_field(ring, slot * FIELDS + 7)
    kv_head = read_field(ring, slot * FIELDS + 8)
    partial = read_field(ring, slot * FIELDS + 9)
    mbarrier.arrive(empty.index(slot), count=1)
    return num_tiles, begin, key_begin, key_end, first_token, num_tokens, num_keys, first_row, kv_head, partial
