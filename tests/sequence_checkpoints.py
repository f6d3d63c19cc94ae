"""A home with sequences at two nights and a checkpoint of random weights, for several rooms."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from sequence_builders import CUTOFF, EventRow, event, events_frame, write_events_sessionized

from behavior_pipeline.encoder.checkpoints import write_untrained
from behavior_pipeline.sequences.files import write_sequences
from behavior_pipeline.sequences.vocabulary import Vocabulary, build_vocabulary, save_vocabulary
from behavior_pipeline.settings import Settings
from behavior_pipeline.storage import Storage

TRAINED_THROUGH = CUTOFF - timedelta(days=5)


def history(user: str, num_events: int, start_hours: float = 0) -> list[EventRow]:
    """So many events of one user, 1, 2, 3, … hours apart."""
    return [
        event(
            user,
            start_hours + number * (number + 1) / 2,
            f"{user}-{number:04d}",
            ["view", "buy"][number % 5 == 0],
            item_id=f"i{number % 7}",
            category=f"c{number % 3}",
            amount=float(number % 11) - 2,
        )
        for number in range(num_events)
    ]


@dataclass(frozen=True)
class Home:
    """A source's home with a vocabulary and an untrained checkpoint of the tiny preset."""

    storage: Storage
    settings: Settings
    vocabulary: Vocabulary
    checkpoint: Path

    @classmethod
    def build(cls, storage: Storage, settings: Settings, rows: list[EventRow]) -> Home:
        write_events_sessionized(storage, events_frame(rows))
        vocabulary = build_vocabulary(storage, settings, ("adjust",), TRAINED_THROUGH)
        save_vocabulary(vocabulary, storage.vocabulary)
        checkpoint = write_untrained(storage.vocabulary, storage.checkpoints, "tiny", seed=0)
        return cls(storage, settings, vocabulary, checkpoint)

    def tokenize(self, rows: list[EventRow], cutoff: datetime) -> Path:
        """Replace the events, write their sequences at the cutoff, and return the folder."""
        write_events_sessionized(self.storage, events_frame(rows))
        folder = self.storage.sequences(cutoff)
        write_sequences(self.storage, self.settings, self.vocabulary, cutoff, folder)
        return folder
