"""ExecutionPlan: its two encodings, its published schema, and what is no plan."""

import json

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.plan import (
    VERSION,
    Acceleration,
    Chunks,
    Decodes,
    Estimates,
    Evictions,
    ExecutionPlan,
    Migrations,
    Moves,
    PlanError,
    Preemptions,
    Reuses,
    Rows,
    check,
    decode,
    encode,
    from_json,
    json_schema,
    to_json,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
TOKENS = st.integers(0, 2**40)


def column(values):
    return np.array(list(values), np.int64)


def tables(kind, **fields):
    """Tables of `kind` with up to four rows; a field is INT64 where nothing is said."""
    columns = {name: fields.get(name, INT64) for name in kind.__struct_fields__}
    rows = st.lists(st.fixed_dictionaries(columns), max_size=4)
    return rows.map(lambda rows: kind(**{n: column(row[n] for row in rows) for n in columns}))


@st.composite
def plans(draw):
    """Plans that `check` accepts."""
    ids = tuple(draw(st.lists(st.text(max_size=8), min_size=1, max_size=5, unique=True)))
    peers = tuple(draw(st.lists(st.text(max_size=4), min_size=1, max_size=3)))
    num_steps = draw(st.integers(1, 20))
    row, peer = st.integers(0, len(ids) - 1), st.integers(0, len(peers) - 1)
    bit, moves = st.integers(0, 1), tables(Moves, row=row, peer=peer)
    begins = draw(tables(Chunks, row=row, step=st.integers(0, num_steps - 1), begin=TOKENS))
    samples = column(draw(bit) for _ in range(len(begins)))
    lengths = column(draw(st.integers(1, 2**20)) for _ in range(len(begins)))
    return ExecutionPlan(
        plan_id=draw(st.text(max_size=20)),
        round=draw(TOKENS),
        target_instance_id=draw(st.text(max_size=8)),
        mode=draw(st.sampled_from(["strict", "time-share", "hybrid"])),
        num_steps=num_steps,
        max_step_tokens=draw(TOKENS),
        peers=peers,
        request_ids=ids,
        rows=Rows(**{n: column(draw(INT64) for _ in ids) for n in Rows.__struct_fields__}),
        chunks=msgspec.structs.replace(begins, end=begins.begin + lengths, samples=samples),
        decodes=draw(tables(Decodes, row=row)),
        preemptions=draw(tables(Preemptions, row=row, how=bit)),
        reuses=draw(tables(Reuses, row=row)),
        imports=draw(moves),
        exports=draw(moves),
        evictions=draw(tables(Evictions)),
        migrations=draw(tables(Migrations)),
        acceleration=Acceleration(draft_tokens=draw(st.integers(0, 9))),
        estimates=draw(tables(Estimates)),
        ir_digest=draw(st.text(alphabet="0123456789abcdef", max_size=16)),
    )


def plan(**fields) -> ExecutionPlan:
    """A small plan that is in order, with changes."""
    given = {
        "plan_id": "p",
        "round": 1,
        "target_instance_id": "d0",
        "mode": "hybrid",
        "num_steps": 2,
        "max_step_tokens": 64,
        "peers": ("d0",),
        "request_ids": ("a", "b"),
        "rows": Rows(**{name: column([4, 5]) for name in Rows.__struct_fields__}),
        "chunks": Chunks(
            step=column([0]),
            row=column([1]),
            begin=column([0]),
            end=column([5]),
            samples=column([1]),
        ),
    }
    return ExecutionPlan(**{**given, **fields})


@given(plans())
def test_msgpack_keeps_every_column(plan):
    check(plan)
    again = decode(encode(plan))
    assert again == plan
    assert hash(again.rows) == hash(plan.rows)


@given(plans())
def test_json_keeps_every_column_and_fits_the_published_schema(plan):
    text = to_json(plan)
    assert from_json(text) == plan
    assert from_json(text.decode()) == plan
    jsonschema.validate(json.loads(text), json_schema())


def test_the_schema_is_a_schema_and_knows_the_version():
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert json.loads(to_json(plan()))["version"] == VERSION


def test_the_schema_refuses_what_from_json_refuses():
    document = json.loads(to_json(plan()))
    del document["plan_id"]
    with pytest.raises(jsonschema.ValidationError, match="plan_id"):
        jsonschema.validate(document, json_schema())
    with pytest.raises(PlanError, match="plan_id"):
        from_json(json.dumps(document))


@given(plans(), st.data())
def test_a_damaged_plan_is_read_or_named_but_never_worse(plan, data):
    encoded = bytearray(encode(plan))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        encoded = encoded[:at]
    try:
        decode(bytes(encoded), "file.plan")
    except PlanError as error:
        assert str(error).startswith("file.plan: ")


def test_columns_that_were_read_cannot_be_written():
    for again in (decode(encode(plan())), from_json(to_json(plan()))):
        with pytest.raises(ValueError, match="read-only"):
            again.chunks.begin[0] = 3


def test_tables_are_equal_by_their_columns():
    assert plan() == plan()
    assert plan().chunks != plan().decodes
    assert plan(decodes=Decodes()) == plan()
    assert dict(plan().tables()).keys() >= {"rows", "chunks", "decodes", "imports"}


ONE = column([0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decodes": Decodes(row=ONE)},
            "p: decodes: columns of different lengths: "
            "{'row': 1, 'begin_step': 0, 'until_tokens': 0}",
        ),
        (
            {"request_ids": ("a",)},
            "p: rows has 2 rows for 1 request_ids; one each",
        ),
        ({"request_ids": ("a", "a")}, "p: request_ids names 'a' twice; a row each"),
        ({"num_steps": -1}, "p: num_steps -1: 0 or more"),
        ({"max_step_tokens": -5}, "p: max_step_tokens -5: 0 or more"),
        (
            {"decodes": Decodes(row=column([2]), begin_step=ONE, until_tokens=ONE)},
            "p: decodes.row[0]: 2 is not in [0, 2)",
        ),
        (
            {"imports": Moves(row=ONE, peer=column([-1]), tokens=ONE)},
            "p: imports.peer[0]: -1 is not in [0, 1)",
        ),
        (
            {"preemptions": Preemptions(row=ONE, how=column([2]))},
            "p: preemptions.how[0]: 2 is not in [0, 2)",
        ),
        (
            {"chunks": Chunks(step=column([2]), row=ONE, begin=ONE, end=ONE + 1, samples=ONE)},
            "p: chunks.step[0]: 2 is not in [0, 2)",
        ),
        (
            {"chunks": Chunks(step=ONE, row=ONE, begin=ONE + 4, end=ONE + 4, samples=ONE)},
            "p: chunks[0]: [4, 4) is empty; leave it out",
        ),
    ],
)
def test_a_plan_that_does_not_hold_together_is_refused(changes, message):
    with pytest.raises(PlanError) as caught:
        check(plan(**changes), "p")
    assert str(caught.value) == message


def mutated(**fields) -> str:
    return json.dumps({**json.loads(to_json(plan())), **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an ExecutionPlan: Input data was truncated"),
        ("[]", "not an ExecutionPlan: Expected `object`, got `array`"),
        (mutated(version=7), "plan version 7; this sagec reads 1"),
        (mutated(plan_id=3), "Expected `str`, got `int`"),
        (mutated(steps=3), "unknown field `steps`"),
        (mutated(rows={"prompt_tokens": "x"}), "a column is a list of integers"),
        (mutated(rows={"prompt_tokens": [1.5]}), "a column is a list of integers"),
        (mutated(rows={"prompt_tokens": [True]}), "a column is a list of integers"),
        (mutated(rows={"prompt_tokens": [2**63]}), "a column holds integers of 64 bits"),
        (mutated(num_steps=0), "chunks.step[0]: 0 is not in [0, 0)"),
        ("[" * 100_000, "not an ExecutionPlan: "),
    ],
)
def test_json_that_is_no_plan_is_named(text, message):
    with pytest.raises(PlanError) as caught:
        from_json(text, "my.json")
    assert str(caught.value).startswith("my.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named():
    with pytest.raises(PlanError, match=r"^my.json: not an ExecutionPlan: "):
        from_json(b'{"plan_id": "\xff"}', "my.json")


def test_msgpack_of_a_broken_column_is_named():
    broken = msgspec.msgpack.encode(
        {**msgspec.msgpack.decode(encode(plan())), "rows": {"prompt_tokens": b"123"}}
    )
    with pytest.raises(PlanError, match="a column is the bytes of an int64 array"):
        decode(broken)


def test_only_int64_columns_are_encoded():
    narrow = np.zeros(1, np.int32)
    with pytest.raises(TypeError, match="a column is an array of int64, not int32"):
        encode(plan(decodes=Decodes(row=narrow, begin_step=ONE, until_tokens=ONE)))
    with pytest.raises(TypeError, match="a column is an array of int64, not range"):
        encode(plan(decodes=Decodes(row=range(1), begin_step=ONE, until_tokens=ONE)))
