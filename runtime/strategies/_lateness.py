"""Which prompts to save when not all can be in time."""

import heapq

import numpy as np

from sagec.runtime.state import Bools, Ints


def most_in_time(took_us: Ints, due_us: Ints) -> Bools:
    """The rows that are in time if the most are to be, served one after the other from time 0.

    Moore and Hodgson's rule: go through them by deadline; whenever one would be late, give up the
    longest so far. No other choice makes fewer late.

    >>> most_in_time(np.array([5, 2, 2]), np.array([6, 7, 8]))
    array([False,  True,  True])
    """
    order = np.argsort(due_us, kind="stable")
    kept = np.ones(len(order), bool)
    if _all_in_time(took_us[order], due_us[order]):
        return kept
    end_us = 0
    longest: list[tuple[int, int]] = []
    for row, took, due in zip(
        order.tolist(), took_us[order].tolist(), due_us[order].tolist(), strict=True
    ):
        heapq.heappush(longest, (-took, -row))
        end_us += took
        if end_us > due:
            negative_us, negative_row = heapq.heappop(longest)
            end_us += negative_us
            kept[-negative_row] = False
    return kept


def rejoined(took_us: Ints, due_us: Ints, kept: Bools, given_up: Bools, margin_us: Ints) -> Bools:
    """`kept`, and of those given up before the ones that can be saved after all, with a margin.

    The shortest come back first, until one makes itself or another late: nobody that is kept is
    given up for one that was given up.
    """
    kept = kept.copy()
    hopeful = np.flatnonzero(given_up & (took_us + margin_us <= due_us))
    for row in hopeful[np.argsort(took_us[hopeful], kind="stable")].tolist():
        rows = np.append(np.flatnonzero(kept), row)
        due = due_us[rows].copy()
        due[-1] -= margin_us[row]
        order = np.argsort(due, kind="stable")
        if not _all_in_time(took_us[rows][order], due[order]):
            break
        kept[row] = True
    return kept


def _all_in_time(took_us: Ints, due_us: Ints) -> bool:
    return bool((np.cumsum(took_us) <= due_us).all())
