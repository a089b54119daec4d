"""How much memory a computation takes, by the account of torch's own allocator."""

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def peak_bytes(compute: Callable[[], Result]) -> tuple[Result, int]:
    """What `compute` gives, and the most bytes that it held at a time, on the CPU, of those that it
    allocated: tensors, and what torch's operators need within.

    Counted from nothing, so that what was there before, as weights and KV, is left out. What gloo
    and C code allocate by themselves is not torch's. This thread's account: what another thread
    frees seems to be held, as now and then a message of which gloo lets go last. Prints a line
    unless the environment's KINETO_LOG_LEVEL is high before torch is imported.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        result = compute()
    results: Any = told.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    live = itertools.accumulate(event.nbytes() for event in changes)
    return result, max(live, default=0)
