"""A request as TurboMind runs it: a session that starts and ends with it."""

import secrets
import threading
from collections.abc import Callable, Collection, Sequence
from enum import IntEnum
from typing import Any

import numpy as np

from sagec.runtime.request import Sampling


class SessionStatus(IntEnum):
    """How a session is, by TurboMind's own numbers."""

    RUNNING = 0
    INVALID = 1
    CONFLICT = 2
    BUSY = 3
    INACTIVE = 4
    FAILED = 5
    TOO_LONG = 6
    FINISHED = 7
    CANCELLED = 8
    INCONSISTENT = 9


class Session:
    """A request on its way through TurboMind.

    `on_end`, where it is given, is called once, on TurboMind's own thread for that: it may set
    flags and wake threads, and must not wait, raise, or call TurboMind.
    """

    def __init__(
        self, number: int, prompt_tokens: int, on_end: Callable[["Session"], None] | None = None
    ) -> None:
        self.number = number
        self.status = SessionStatus.RUNNING
        self._prompt_tokens = prompt_tokens
        self._num_tokens = prompt_tokens
        self._on_end = on_end
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._request: Any = None
        self._outputs: Any = None
        self._state: Any = None

    def submit(self, request: Any, inputs: Any, parameters: Any, generation: Any) -> None:
        """Give it to TurboMind's `request`, which must not have been used. Called once."""
        self._request = request
        outputs, state, _ = request.forward(
            inputs, parameters, generation, False, False, self._state_changed
        )
        with self._lock:
            self._outputs, self._state = outputs, state
        self._state_changed()  # it may have ended before its state was here

    def cancel(self) -> None:
        """Let it end at the next step; `on_end` follows. Nothing where it has ended."""
        self._request.cancel()

    @property
    def ended(self) -> bool:
        """Whether it is over, however it went."""
        return self._ended.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, waiting so long for it."""
        return self._ended.wait(timeout_s)

    def output(self) -> list[int]:
        """The tokens sampled, once it has finished; a stop token is the last of them.

        Empty where it ended otherwise: TurboMind then says no length that could be trusted.
        """
        if self.status is not SessionStatus.FINISHED:
            return []
        from torch.utils.dlpack import from_dlpack

        tokens = from_dlpack(self._outputs["output_ids"])
        return [int(token) for token in tokens[self._prompt_tokens : self._num_tokens]]

    def _state_changed(self) -> None:
        with self._lock:
            state = None if self._state is None else self._state.consume()
            if state is None or state.status == 0:
                return
            self.status = SessionStatus(state.status)
            self._num_tokens = state.seq_len
        self._ended.set()
        if self._on_end is not None:
            self._on_end(self)


def session_parameters(number: int) -> Any:
    """TurboMind's parameters of a session that begins and ends with one request."""
    import _turbomind

    return _turbomind.SessionParam(id=number, step=0, start=True, end=True)


def session_inputs(tokens: Sequence[int]) -> Any:
    """TurboMind's input tensors: the tokens [n], int32; it keeps them alive."""
    import _turbomind

    inputs = _turbomind.TensorMap()
    inputs["input_ids"] = _turbomind.from_dlpack(np.asarray(tokens, dtype=np.int32))
    return inputs


def generation_config(max_new_tokens: int, sampling: Sampling, stop_tokens: Collection[int]) -> Any:
    """TurboMind's generation configuration: exactly so many tokens, fewer where one stops it.

    TurboMind itself samples one token more than its `max_new_tokens`.
    """
    import _turbomind

    generation = _turbomind.GenerationConfig()
    generation.max_new_tokens = max_new_tokens - 1
    if sampling.temperature == 0:
        generation.top_k = 1
    else:
        generation.temperature = sampling.temperature
        generation.top_k = sampling.top_k
        generation.top_p = sampling.top_p
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        generation.random_seed = seed % 2**64
    if stop_tokens:
        words = sorted(stop_tokens)
        generation.stop_ids = [words, list(range(1, len(words) + 1))]
        generation.eos_ids = words
    return generation
