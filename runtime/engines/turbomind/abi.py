"""What sagec_turbomind.h declares, for ctypes: constants, structures and functions.

A constant has the header's name without SAGEC_TM_, a structure and a function without sagec_tm_; a
test holds this file against the header.
"""

import ctypes
from ctypes import c_char_p, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from typing import Any

ABI = 1
INSTANCE_SHIFT = 48
"""The number of a session's instance is its bits from here on."""

STOCK, PLANS, ANSWERS = range(3)
"""Who decides the steps of an instance."""

STEP, PLAN_DONE, ERASED, PREEMPTED, MATCHED, STORED, EVICTED = range(1, 8)
EXPORTED, IMPORTED, NOT_IMPORTED, GAP = range(8, 12)
"""Kinds of events."""

BY_STOCK, BY_PLAN, BY_ANSWER, BY_DEADLINE = range(4)
"""Who decided a step."""

ROW_SAMPLED, ROW_FINISHED = 1, 2
"""Flags of a row of a step."""

NO_ROOM, NOT_ALL_RANKS, TOO_LONG, OTHER_BLOCKS, OTHER_TOKENS, NOT_COPIED = range(1, 7)
"""Why staged KV was not imported."""

TO_HOST, TO_DEVICE = 1, 2
"""Where KV is moved."""

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, REDUCE, NUM_COLLECTIVES = range(6)
"""Collectives that are counted, and how many kinds there are."""

_Fields = tuple[tuple[str, Any], ...]


def _fields(kind: Any, names: str) -> _Fields:
    return tuple((name, kind) for name in names.split())


class Options(ctypes.Structure):
    """sagec_tm_options."""

    _fields_ = (
        *_fields(c_int32, "decider strict guard num_ranks"),
        *_fields(c_int64, "deadline_us log_capacity"),
    )


class Plan(ctypes.Structure):
    """sagec_tm_plan."""

    _fields_ = (
        *_fields(c_int64, "plan num_steps max_step_tokens"),
        *_fields(c_int32, "mixes_phases num_rows num_chunks num_decodes"),
        *_fields(c_void_p, "sessions prompt_tokens reused_tokens"),
        *_fields(c_void_p, "chunk_step chunk_row chunk_begin chunk_end"),
        *_fields(c_void_p, "decode_row decode_begin_step decode_until_tokens"),
    )


class Question(ctypes.Structure):
    """sagec_tm_question."""

    _fields_ = (
        ("step", c_int64),
        *_fields(c_int32, "num_rows free_blocks cached_blocks budget_tokens"),
    )


class Row(ctypes.Structure):
    """sagec_tm_row."""

    _fields_ = (
        *_fields(c_uint64, "session priority"),
        *_fields(c_int32, "context computed status pad"),
    )


class Item(ctypes.Structure):
    """sagec_tm_item."""

    _fields_ = (("session", c_uint64), ("end", c_int64))


class Block(ctypes.Structure):
    """sagec_tm_block."""

    _fields_ = (
        *_fields(c_int64, "uid timestamp"),
        *_fields(c_int32, "id use_count"),
        ("data", c_void_p),
    )


class Blocks(ctypes.Structure):
    """sagec_tm_blocks."""

    _fields_ = (
        ("block_bytes", c_int64),
        *_fields(c_int32, "block_tokens num_blocks active cached free pad"),
    )


class Move(ctypes.Structure):
    """sagec_tm_move."""

    _fields_ = (
        ("session", c_uint64),
        *_fields(c_int32, "direction pad"),
        ("blob", c_void_p),
        ("num_bytes", c_int64),
        ("layout", c_uint64),
    )


class Counters(ctypes.Structure):
    """sagec_tm_counters."""

    _fields_ = (
        *_fields(c_int64, "steps held_steps fallbacks unplanned_rows missed_rows guarded_blocks"),
        *_fields(c_int64, "matched_tokens stored_blocks evicted_blocks preemptions"),
        *_fields(c_int64, "exports imports refused_imports"),
    )


class Collective(ctypes.Structure):
    """sagec_tm_collective."""

    _fields_ = _fields(c_int64, "calls bytes enqueue_ns device_us timed_calls")


Evicted = ctypes.CFUNCTYPE(None, c_uint32, c_int32, c_uint64, c_void_p)
"""sagec_tm_evicted: (instance, block, uid, argument)."""

STRUCTURES: dict[str, type[ctypes.Structure]] = {
    kind.__name__.lower(): kind
    for kind in (Options, Plan, Question, Row, Item, Block, Blocks, Move, Counters, Collective)
}

_pointer = ctypes.POINTER

FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "abi": (c_int32, ()),
    "seams": (c_char_p, ()),
    "selftest": (c_char_p, ()),
    "apply": (c_char_p, ()),
    "revert": (c_char_p, ()),
    "num_slots": (c_int32, ()),
    "open": (c_char_p, (c_uint32, _pointer(Options))),
    "close": (None, (c_uint32,)),
    "wake": (None, (c_uint32,)),
    "post_plan": (c_char_p, (c_uint32, _pointer(Plan))),
    "wait_question": (
        c_int32,
        (c_uint32, c_int64, _pointer(Question), _pointer(Row), c_int32),
    ),
    "answer": (c_char_p, (c_uint32, c_int64, _pointer(Item), c_int32)),
    "read": (c_int64, (c_uint32, c_void_p, c_int64, c_int64)),
    "get_block_info": (c_char_p, (c_uint32, c_int32, _pointer(Blocks), c_void_p, c_int32)),
    "register_eviction_callback": (c_char_p, (c_uint32, Evicted, c_void_p)),
    "migrate_blocks": (c_char_p, (c_uint32, _pointer(Move), c_int32)),
    "forget": (None, (c_uint32, c_uint64)),
    "take_export": (c_char_p, (c_uint32, c_uint64, c_void_p, c_int64)),
    "layout": (c_uint64, (c_uint64, c_int64, c_int32, c_int32)),
    "set_layout": (None, (c_uint32, c_uint64)),
    "crc32c": (c_uint32, (c_void_p, c_int64, c_int32)),
    "count": (c_char_p, (c_uint32, _pointer(Counters))),
    "cursor_new": (c_void_p, (_pointer(Plan),)),
    "cursor_next": (
        c_int32,
        (c_void_p, _pointer(Row), c_int32, _pointer(Item), c_int32, _pointer(c_int64)),
    ),
    "cursor_gaps": (c_int32, (c_void_p,)),
    "cursor_free": (None, (c_void_p,)),
    "collectives": (None, (_pointer(Collective),)),
    "time_collectives": (None, (c_int32,)),
}
"""Result and arguments of each function."""


def load(path: str) -> Any:
    """The library at `path` with all of FUNCTIONS typed, as attributes with their C names.

    Raises OSError where it does not load, AttributeError where it lacks a function.
    """
    library = ctypes.CDLL(path)
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, f"sagec_tm_{name}")
        function.restype, function.argtypes = result, arguments
    return library
