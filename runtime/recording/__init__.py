"""Recordings: every round of a loop in a file, cheap to write, safe to lose power over.

    recorder = Recorder("serve.rec", header, clock)
    with recorder, ExecutorAPI(engines, watch=[recorder.hear]) as executor:
        ...
    for entry in Recording("serve.rec").everything():
        ...

`frames` is how the bytes lie, `entries` what they say, `columns` how tables become changed rows;
docs/recording-format.md says it all for people who write other readers.
"""

from sagec.runtime.recording.entries import Header
from sagec.runtime.recording.frames import RecordingError
from sagec.runtime.recording.reader import Recording
from sagec.runtime.recording.recorder import Recorder
from sagec.runtime.recording.rounds import Round

__all__ = ["Header", "Recorder", "Recording", "RecordingError", "Round"]
