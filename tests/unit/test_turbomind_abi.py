"""The Python side of the C ABI says what the header says, and reads what the log writes."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.compiled import compiled
from sagec.runtime.engines.turbomind import abi, native, native_events
from sagec.runtime.engines.turbomind.build import PATCHES

HEADER = re.sub(r"/\*.*?\*/", "", (PATCHES / "sagec_turbomind.h").read_text("utf-8"), flags=re.S)
FUNCTION = re.compile(r"^((?:const )?\w+ \*?)sagec_tm_(\w+)\(([^;]*)\);", re.M)

WORDS = {
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
}


def declared() -> dict[str, tuple[str, list[str]]]:
    """Result and arguments of every function of the header, as text."""
    found = {}
    for result, name, arguments in FUNCTION.findall(HEADER):
        each = [] if arguments == "void" else [text.strip() for text in arguments.split(",")]
        found[name] = (result.strip(), each)
    return found


def fits(text: str, kind: Any) -> bool:
    """Whether ctypes' `kind` can stand for an argument or result declared as `text`."""
    if text == "void":
        return kind is None
    if "*" in text or "[" in text:
        if kind is ctypes.POINTER(ctypes.c_int64):
            return text.startswith("int64_t")
        named = re.search(r"sagec_tm_(\w+)", text)
        if named and kind is not ctypes.c_void_p:
            return bool(kind._type_ is abi.STRUCTURES[named.group(1)])
        return kind is (ctypes.c_char_p if "char" in text else ctypes.c_void_p)
    if text.startswith("sagec_tm_evicted"):
        return kind is abi.Evicted
    return kind is WORDS[text.split()[0]]


def test_every_function_of_the_header_is_bound_and_no_other() -> None:
    assert sorted(declared()) == sorted(abi.FUNCTIONS)


@pytest.mark.parametrize("name", sorted(abi.FUNCTIONS))
def test_a_bound_function_takes_what_the_header_says(name: str) -> None:
    result, arguments = declared()[name]
    kind, kinds = abi.FUNCTIONS[name]
    assert fits(result, kind), result
    assert len(arguments) == len(kinds)
    for text, bound in zip(arguments, kinds, strict=True):
        assert fits(text, bound), text


def constants() -> list[str]:
    """Enumerators and macros of the header, without SAGEC_TM_."""
    inside = "".join(re.findall(r"enum \{(.*?)\}", HEADER, re.S))
    macros = re.findall(r"#define SAGEC_TM_(\w+) ", HEADER)
    return macros + re.findall(r"SAGEC_TM_(\w+)", inside)


def test_every_constant_of_the_header_is_here() -> None:
    assert constants()
    for name in constants():
        assert isinstance(getattr(abi, name), int), name


def test_every_structure_of_the_header_is_here() -> None:
    assert sorted(re.findall(r"\} sagec_tm_(\w+);", HEADER)) == sorted(abi.STRUCTURES)


def test_a_c_compiler_agrees_with_every_size_offset_and_constant(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    lines = ["#include <stddef.h>", '#include "sagec_turbomind.h"']
    for name in constants():
        lines.append(f'_Static_assert(SAGEC_TM_{name} == {getattr(abi, name)}, "{name}");')
    for name, kind in abi.STRUCTURES.items():
        lines.append(f'_Static_assert(sizeof(sagec_tm_{name}) == {ctypes.sizeof(kind)}, "{name}");')
        for field, *_ in kind._fields_:
            offset = getattr(kind, field).offset
            lines.append(
                f'_Static_assert(offsetof(sagec_tm_{name}, {field}) == {offset}, "{name}.{field}");'
            )
    source = tmp_path / "check.c"
    source.write_text("\n".join(lines))
    command = [compiler, "-std=c11", "-fsyntax-only", f"-I{PATCHES}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_blocks_are_read_as_the_structure_lays_them_out() -> None:
    assert native.BLOCK.itemsize == ctypes.sizeof(abi.Block)
    for name, *_ in abi.Block._fields_:
        assert native.BLOCK.fields[name][1] == getattr(abi.Block, name).offset


def test_a_name_for_each_collective() -> None:
    assert len(native.COLLECTIVES) == abi.NUM_COLLECTIVES
    for number, name in enumerate(native.COLLECTIVES):
        assert getattr(abi, name.upper()) == number


numbers = st.integers(-(2**63), 2**63 - 1)
sessions = st.integers(0, 2**64 - 1)
rows = st.builds(native_events.StepRow, sessions, *[numbers] * 5)
uids = st.lists(numbers, max_size=5).map(tuple)
happened = st.one_of(
    st.builds(native_events.Step, *[numbers] * 9, rows=st.lists(rows, max_size=4).map(tuple)),
    st.builds(native_events.PlanEnded, numbers),
    st.builds(native_events.Erased, sessions, numbers),
    st.builds(native_events.LostKV, sessions, numbers, numbers),
    st.builds(native_events.Matched, sessions, numbers),
    st.builds(native_events.Stored, sessions, uids),
    st.builds(native_events.Evicted, uids),
    st.builds(native_events.Exported, sessions, *[numbers] * 4),
    st.builds(native_events.Imported, sessions, *[numbers] * 4),
    st.builds(native_events.NotImported, sessions, numbers),
    st.builds(native_events.Gap, sessions, *[numbers] * 4),
)

KINDS = {
    native_events.Step: abi.STEP,
    native_events.PlanEnded: abi.PLAN_DONE,
    native_events.Erased: abi.ERASED,
    native_events.LostKV: abi.PREEMPTED,
    native_events.Matched: abi.MATCHED,
    native_events.Stored: abi.STORED,
    native_events.Evicted: abi.EVICTED,
    native_events.Exported: abi.EXPORTED,
    native_events.Imported: abi.IMPORTED,
    native_events.NotImported: abi.NOT_IMPORTED,
    native_events.Gap: abi.GAP,
}


def signed(session: int) -> int:
    return session - (1 << 64) if session >> 63 else session


def words_of(event: Any) -> list[int]:
    """The event as the native side writes it."""
    fields: list[int] = []
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if name == "session":
            fields.append(signed(value))
        elif name == "uids":
            fields += [len(value), *value]
        elif name == "rows":
            fields.append(len(value))
            for row in value:
                fields += [
                    signed(row.session),
                    *(row.begin, row.end, row.planned_end, row.token, row.flags),
                ]
        else:
            fields.append(value)
    return [KINDS[type(event)], len(fields) + 2, *fields]


def test_every_kind_of_event_is_read() -> None:
    assert sorted(KINDS.values()) == list(range(abi.STEP, abi.GAP + 1))


@given(st.lists(happened, max_size=6))
def test_what_the_log_writes_is_read_back(written: list[Any]) -> None:
    words = [word for event in written for word in words_of(event)]
    assert list(native_events.events(words)) == written


def test_an_event_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 99"):
        list(native_events.events([99, 2]))


def test_the_flags_of_a_row_have_names() -> None:
    row = native_events.StepRow(1, 0, 4, 4, 7, abi.ROW_SAMPLED)
    assert row.samples and not row.finished
    assert native_events.StepRow(1, 0, 4, 4, 7, abi.ROW_FINISHED).finished


def library(folder: Path, version: int, lacks: str = "") -> Path:
    """A library with the functions of the ABI, all of which do nothing, but for its version."""
    lines = [f"void sagec_tm_{name}(void) {{}}" for name in abi.FUNCTIONS if name != lacks]
    lines[0] = f"int sagec_tm_abi(void) {{ return {version}; }}"
    source = folder / "empty.c"
    source.write_text("\n".join(lines))
    return compiled("empty", [source])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAGEC_CACHE", str(tmp_path / "cache"))
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    return tmp_path


def test_a_library_of_another_version_is_refused(cache: Path) -> None:
    with pytest.raises(native.NativeError, match=f"is of ABI 99; wanted is {abi.ABI}"):
        native.Native(library(cache, version=99))


def test_a_library_that_lacks_a_function_is_refused(cache: Path) -> None:
    with pytest.raises(native.NativeError, match=r"does not load: .*sagec_tm_wait_question"):
        native.Native(library(cache, version=abi.ABI, lacks="wait_question"))


def test_a_library_that_is_none_is_refused(cache: Path) -> None:
    (cache / "text.so").write_text("text")
    with pytest.raises(native.NativeError, match=r"text\.so does not load"):
        native.Native(cache / "text.so")


def test_a_plan_whose_columns_do_not_fit_together_is_refused_before_it_is_read(cache: Path) -> None:
    instance = native.NativeInstance(native.Native(library(cache, abi.ABI)).library, 1)
    none = np.zeros(0, np.int64)
    columns = dict.fromkeys(native.PlanColumns.__struct_fields__[4:], none)
    columns |= {"sessions": np.zeros(0, np.uint64), "chunk_end": np.ones(1, np.int64)}
    plan = native.PlanColumns(plan=1, num_steps=1, max_step_tokens=1, mixes_phases=True, **columns)
    with pytest.raises(ValueError, match="columns of one table differ in length: chunk_step, "):
        instance.post_plan(plan)
