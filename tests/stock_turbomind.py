"""Stock TurboMind over the toy model: functions that a test calls in a process of its own."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sagec.runtime.engines import EngineError, InstanceSpec
from sagec.runtime.engines.turbomind import toy
from sagec.runtime.engines.turbomind.loading import Loaded, load, submit_session
from sagec.runtime.engines.turbomind.options import read_options
from sagec.runtime.engines.turbomind.sessions import Session
from sagec.runtime.engines.turbomind.toy import harness
from sagec.runtime.request import Sampling

TINY = Path(__file__).parent.parent / "examples" / "models" / "tiny"
VOCAB = 1000
PATIENCE_S = 100.0
FLOAT16, FLOAT32, BFLOAT16, INT32 = 6, 7, 9, 2


def open_toy(
    kv_blocks: int = 64, block_tokens: int = 16, model: str = "", **options: Any
) -> Loaded:
    """A stock TurboMind over the toy."""
    told = {"maths": "toy", "prefix_cache": "off"} | {k: str(v) for k, v in options.items()}
    spec = InstanceSpec(
        id="i",
        engine="turbomind",
        model=model,
        kv_blocks=kv_blocks,
        block_tokens=block_tokens,
        options=told,
    )
    return load(spec, read_options(spec))


def prompt(num_tokens: int, seed: int = 1) -> list[int]:
    """Some tokens, of which no two prompts have the first in common."""
    return [(seed * 31 + i * (seed + 6)) % 997 for i in range(num_tokens)]


def finish(sessions: Sequence[Session]) -> list[list[int]]:
    """Their outputs, when they have ended."""
    for session in sessions:
        assert session.wait(PATIENCE_S), f"session {session.number} hangs"
        assert session.status.name == "FINISHED", session.status
    return [session.output() for session in sessions]


def outputs(prompts: list[int], count: int, **settings: Any) -> list[list[list[int]]]:
    """Of prompts of these lengths, served together: their outputs, and what they should be."""
    loaded = open_toy(**settings)
    told = [prompt(length, seed) for seed, length in enumerate(prompts, 1)]
    sessions = [
        submit_session(loaded, number, tokens, count, Sampling())
        for number, tokens in enumerate(told, 1)
    ]
    got = finish(sessions)
    loaded.close()
    vocab = loaded.vocab_size
    return [got, [toy.generate(tokens, count, vocab) for tokens in told]]


def stopped(at: int) -> list[list[int]]:
    """An output whose token `at` is a stop token, and the reference's before it."""
    loaded = open_toy()
    whole = toy.generate(prompt(40), 50, VOCAB)
    stop = [whole[at], VOCAB + 5]
    (got,) = finish([submit_session(loaded, 1, prompt(40), 50, Sampling(), stop)])
    loaded.close()
    return [got, toy.generate(prompt(40), 50, VOCAB, stop)]


def prompt_twice(prefix_cache: str) -> dict[str, Any]:
    """A prompt of 100 tokens and then itself with 20 more: outputs, and where each step began."""
    loaded = open_toy(prefix_cache=prefix_cache)
    first, second = prompt(100), prompt(100) + prompt(20, 9)
    bench = toy.install()
    bench.trace()
    got = [
        finish([submit_session(loaded, number, tokens, 5, Sampling())])[0]
        for number, tokens in enumerate((first, second), 1)
    ]
    begins = [step.rows[2][0] for step in bench.take_trace() if 2 in step.rows]
    bench.trace(False)
    loaded.close()
    expected = [toy.generate(tokens, 5, VOCAB) for tokens in (first, second)]
    return {"got": got, "expected": expected, "begins": begins}


def ranks_in_step(tp: int) -> dict[str, list[Any]]:
    """Steps of each rank."""
    bench = toy.install()
    bench.trace()
    outputs([150, 90, 200], 12, tp=tp, step_tokens=64)
    steps = bench.take_trace()
    bench.trace(False)
    return {
        str(rank): [sorted(step.rows.items()) for step in steps if step.rank == rank]
        for rank in range(tp)
    }


def parts_of_a_step() -> list[list[int]]:
    """Which of three prompts each step had, where a pass of the model takes but one of them.

    They come while a step is under way that takes its time, or with it, and so most often together.
    """
    loaded = open_toy(session_len=256, step_us=200_000)
    bench = toy.install()
    bench.trace()
    numbers = {1: 10, 2: 200, 3: 200, 4: 200}
    sessions = [
        submit_session(loaded, number, prompt(length, number), 2 if number > 1 else 1, Sampling())
        for number, length in numbers.items()
    ]
    got = finish(sessions)
    loaded.close()
    steps = bench.take_trace()
    bench.trace(False)
    assert got[1:] == [toy.generate(prompt(200, number), 2, VOCAB) for number in (2, 3, 4)]
    long = [sorted(step.rows.keys() - {1}) for step in steps]
    return [numbers for numbers in long if numbers]


def flipped(position: int, bit: int, tp: int) -> list[list[int]]:
    """An output after a bit of the KV was flipped under it, and the reference's."""
    loaded = open_toy(tp=tp)
    toy.install().flip(1, position, bit)
    (got,) = finish([submit_session(loaded, 1, prompt(90), 8, Sampling())])
    loaded.close()
    return [got, toy.generate(prompt(90), 8, VOCAB)]


def two_engines() -> list[list[list[int]]]:
    """Two models of different vocabulary, block size and pace, at the same time."""
    ours, tiny = open_toy(), open_toy(32, 8, str(TINY), step_us=1000)
    sessions = [
        submit_session(ours, 1, prompt(70), 9, Sampling()),
        submit_session(tiny, 1, prompt(70), 9, Sampling()),
    ]
    got = finish(sessions)
    ours.close()
    tiny.close()
    return [got, [toy.generate(prompt(70), 9, vocab) for vocab in (VOCAB, 1024)]]


def time_taken(step_us: int, token_us: int) -> dict[str, int]:
    """Of a prompt of 100 tokens and 4 more: steps of all, and how long they took."""
    loaded = open_toy(step_us=step_us, token_us=token_us)
    before, begin_s = toy.install().steps, time.monotonic()
    finish([submit_session(loaded, 1, prompt(100), 5, Sampling())])
    taken_us = (time.monotonic() - begin_s) * 1e6
    loaded.close()
    return {"steps": toy.install().steps - before, "us": int(taken_us)}


def about(model: str) -> dict[str, Any]:
    """What is known of a loaded model."""
    loaded = open_toy(model=model or str(TINY))
    loaded.close()
    names = ("vocab_size", "eos_tokens", "max_context_tokens", "kv_bytes_per_token")
    return {name: getattr(loaded, name) for name in names}


def seeds() -> list[int]:
    """Of layouts: twice the same, then one that differs in block size, model, precision each."""
    made = [
        open_toy(),
        open_toy(),
        open_toy(block_tokens=32),
        open_toy(model=str(TINY)),
        open_toy(quant_policy=8),
    ]
    for loaded in made:
        loaded.close()
    return [loaded.layout_seed for loaded in made]


def close_in_flight(tp: int) -> dict[str, Any]:
    """How sessions end when their engine closes, and what a request gets after that."""
    threads = len(os.listdir("/proc/self/task"))
    loaded = open_toy(tp=tp, step_us=1000, max_batch=2)
    sessions = [submit_session(loaded, n, prompt(50), 900, Sampling()) for n in range(1, 5)]
    loaded.close()
    loaded.close()
    ended = [session.status.name for session in sessions]
    for _ in range(int(PATIENCE_S * 100)):  # the system shows a joined thread for a moment
        if len(os.listdir("/proc/self/task")) == threads:
            break
        threading.Event().wait(0.01)
    return {
        "ended": ended,
        "threads": len(os.listdir("/proc/self/task")) - threads,
        "after": _refusal(lambda: submit_session(loaded, 9, [1], 1, Sampling())),
    }


def leave_in_flight() -> None:
    """Sessions that run when the process ends: the test looks at its exit code."""
    loaded = open_toy(step_us=1000)
    globals()["_left"] = [submit_session(loaded, n, [n] * 40, 900, Sampling()) for n in (1, 2)]


def cancelled() -> dict[str, Any]:
    """A cancelled session among others: how it ended, and whether the others are right."""
    loaded = open_toy(step_us=500)
    one = submit_session(loaded, 1, prompt(60, 1), 800, Sampling())
    others = [submit_session(loaded, n, prompt(60, n), 10, Sampling()) for n in (2, 3)]
    one.cancel()
    assert one.wait(PATIENCE_S)
    got = finish(others)
    loaded.close()
    right = [toy.generate(prompt(60, n), 10, VOCAB) for n in (2, 3)]
    return {"status": one.status.name, "output": one.output(), "right": got == right}


def callbacks() -> dict[str, Any]:
    """Who was told of the end of each of 30 sessions, and how often."""
    loaded = open_toy()
    told: list[int] = []
    sessions = [
        submit_session(loaded, n, prompt(5, n), 1, Sampling(), (), lambda s: told.append(s.number))
        for n in range(1, 31)
    ]
    finish(sessions)
    loaded.close()
    return {"told": sorted(told)}


def refused(**settings: Any) -> str:
    """What the user reads where an engine cannot be made."""
    return _refusal(lambda: open_toy(**settings))


def refused_session(**settings: Any) -> str:
    """What the user reads where a session cannot be started."""
    loaded = open_toy(kv_blocks=4)
    told: dict[str, Any] = {"tokens": [1, 2], "max_new_tokens": 4, "sampling": {}, **settings}
    sampling = Sampling(**told.pop("sampling"))
    refusal = _refusal(lambda: submit_session(loaded, 1, sampling=sampling, **told))
    loaded.close()
    return refusal


def _refusal(act: Any) -> str:
    try:
        act()
    except EngineError as error:
        return str(error)
    return ""


def loaded_libraries() -> list[str]:
    """Libraries of NVIDIA's, or in their place, in a process that has run the toy."""
    outputs([10], 2)
    lines = Path("/proc/self/maps").read_text("utf-8").splitlines()
    names = {Path(line.split()[-1]).name for line in lines if "/" in line}
    marks = ("cuda", "cublas", "nccl", "nvidia", "cudnn")
    return sorted(name for name in names if any(mark in name for mark in marks))


def refused_over_real_cuda(folder: str) -> str:
    """What the user reads where a libcudart is loaded that is not ours: here a copy of it."""
    real = Path(folder) / "libcudart.so.12"
    real.write_bytes(harness.build()["libcudart.so.12"].read_bytes())
    ctypes.CDLL(str(real))
    return refused()


def collective(
    name: str, sent: list[list[float]], kind: int, counts: list[int] | None = None, root: int = 0
) -> dict[str, Any]:
    """A collective of NCCL between threads: each rank's result code and what it received."""
    library = ctypes.CDLL(str(harness.build()["libnccl.so.2"]))
    element = {FLOAT32: ctypes.c_float, INT32: ctypes.c_int32}.get(kind, ctypes.c_uint16)
    num_ranks, length = len(sent), len(sent[0])
    unique = (ctypes.c_char * 128)()
    library.ncclGetUniqueId(unique)
    count = length // num_ranks if name == "ncclReduceScatter" else length
    room = length * num_ranks
    buffers = [(element * room)(*map(element, row)) for row in sent]  # type: ignore[arg-type]
    received = [(element * room)() for _ in sent]
    codes = [0] * num_ranks

    def run(rank: int) -> None:
        joined = ctypes.c_void_p()
        by_value = _UniqueId.from_buffer_copy(unique)
        library.ncclCommInitRank(ctypes.byref(joined), num_ranks, by_value, rank)
        number = ctypes.c_size_t(counts[rank] if counts else count)
        more = {
            "ncclAllReduce": (kind, 0),
            "ncclReduceScatter": (kind, 0),
            "ncclReduce": (kind, 0, root),
            "ncclAllGather": (kind,),
            "ncclBroadcast": (kind, root),
        }[name]
        call = getattr(library, name)
        codes[rank] = call(buffers[rank], received[rank], number, *more, joined, None)
        library.ncclCommDestroy(joined)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"codes": codes, "received": [list(buffer) for buffer in received]}


class _UniqueId(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * 128),)
