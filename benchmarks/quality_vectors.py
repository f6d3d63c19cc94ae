"""Vectors of every moment: our encoder untrained and trained, and CoLES; and the supervised GRU."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property

import numpy as np
import torch
from kept_results import Result
from objectives import tell_steps, training_config
from quality_cells import PROBE_SEED, Cell, Place, kept_cell, means, write_scores
from quality_cutoffs import Moments, day_of
from quality_data import Cut
from quality_networks import (
    Labeled,
    coles_steps,
    coles_vectors,
    supervised_scores,
    train_coles,
    train_supervised,
)

from behavior_pipeline.encoder.architecture import Encoder
from behavior_pipeline.encoder.checkpoints import load_checkpoint, read_vocabulary_facts
from behavior_pipeline.encoder.configuration import EncoderConfig
from behavior_pipeline.encoder.parallel import pick_device
from behavior_pipeline.encoder.sequence_files import read_table
from behavior_pipeline.encoder.train import train

END_TO_END = "end_to_end"
VECTORS = ("untrained", "embedding", "coles")

Arrays = dict[str, np.ndarray]
"""By day of a cutoff the (N, D) vectors of its users."""


class Maker:
    """Trains and embeds.

    Args:
        given: the command line.
        place: the data set and where results go.
    """

    def __init__(self, given: argparse.Namespace, place: Place) -> None:
        self.given, self.place = given, place
        self.data = Moments.at(place.data)
        self.sizes = read_vocabulary_facts(self.data.vocabulary).field_sizes

    @cached_property
    def device(self) -> torch.device:
        """Where networks compute."""
        return pick_device(self.given.device)

    @cached_property
    def cuts(self) -> dict[str, Cut]:
        """Users and histories at every moment."""
        return {day_of(moment): self.data.cut(moment) for moment in self.data.moments}

    def make(self, name: str, seed: int) -> None:
        """Write a representation's vectors of all moments, unless they are there."""
        makers = {"untrained": self._untrained, "embedding": self._embedding, "coles": self._coles}
        kept, path = self.place.kept, self.place.vectors(name, seed)
        if not path.is_file():
            (kept.folder / f"vectors-{name}-{seed}.json").unlink(missing_ok=True)
        more = {"training": self.place.training} if name == "embedding" else {}
        kept.result(
            f"vectors-{name}", seed, lambda: self._written(makers[name], name, seed), **more
        )

    def _written(
        self, maker: Callable[[int], tuple[Arrays, Result]], name: str, seed: int
    ) -> Result:
        """Make vectors, write them and tell how long it took."""
        began = time.perf_counter()
        arrays, facts = maker(seed)
        write_scores(self.place.vectors(name, seed), arrays)
        return {**facts, "seconds": round(time.perf_counter() - began, 1)}

    def _untrained(self, seed: int) -> tuple[Arrays, Result]:
        """Embed with the encoder as it is before training."""
        torch.manual_seed(seed)
        encoder = Encoder(EncoderConfig.named(self.given.preset, self.sizes))
        return self._embedded(encoder.eval().to(self.device)), {}

    def _embedding(self, seed: int) -> tuple[Arrays, Result]:
        """Train our encoder on what was before the earliest train cutoff."""
        folder = self.place.out / f"training-{seed}"
        sequences = self.data.write_training_sequences(folder / "sequences")
        summary = train(
            sequences, self.data.vocabulary, folder / "checkpoints",
            training_config(self.given, self.given.weights, seed, self.data, self.device),
            report=tell_steps(self.data.name, seed), unfinished="discard",
        )  # fmt: skip
        checkpoint = load_checkpoint(summary.folder, str(self.device))
        if checkpoint.trained_through > self.data.trained_through:
            raise ValueError("the encoder has seen a train cutoff")
        arrays = self._embedded(checkpoint.encoder)
        shutil.rmtree(folder)
        return arrays, {"num_steps": summary.num_steps, "best_step": summary.best_step}

    def _embedded(self, encoder: Encoder) -> Arrays:
        """Return embeddings at all moments."""
        return {day: cut.embed(encoder) for day, cut in self.cuts.items()}

    def _coles(self, seed: int) -> tuple[Arrays, Result]:
        """Train CoLES on the same events, and embed."""
        table = read_table(self.data.training_sequences(), "training sequences")
        steps = self.given.coles_steps or coles_steps(table)
        network = train_coles(table, self.sizes, seed, steps, self.device)
        cuts = self.cuts.items()
        arrays = {day: coles_vectors(network, cut.sequences, self.device) for day, cut in cuts}
        return arrays, {"num_steps": steps}

    def supervise(self, cell: Cell) -> Result | None:
        """Train a GRU on the labels of the train cutoff and judge it, unless that is done."""
        return kept_cell(self.place, cell, lambda: self._supervised(cell))

    def _supervised(self, cell: Cell) -> Result:
        """Train and judge."""
        pair = self.data.pairs[cell.pair]
        before, after = (self.cuts[day_of(moment)] for moment in pair)
        tasks = self.data.tasks(pair)
        labels = np.column_stack([each for task in tasks for each in task.train_labels])
        users = Labeled(before.sequences, labels)
        network = train_supervised(users, self.sizes, cell.seed, self.device)
        found = supervised_scores(network, after.sequences, self.device)
        ends = np.cumsum([len(task.targets) for task in tasks])
        rows = np.arange(len(after.population))
        scores: Arrays = {}
        result: Result = {}
        for task, columns in zip(tasks, np.split(found, ends[:-1], axis=1), strict=True):
            scores[f"{task.name}/{END_TO_END}"] = columns
            result[f"{task.name}/{END_TO_END}"] = {
                **means(task, rows, columns),
                "held_out_loss": 0.0,  # there is nothing to choose
            }
        write_scores(self.place.scores(cell), scores)
        return result


def training_of(given: argparse.Namespace) -> dict[str, object]:
    """Return what our encoder's results depend on."""
    return {
        "preset": given.preset, "steps": given.steps, "batch_tokens": given.batch_tokens,
        "weights": asdict(given.weights), "probe_seed": PROBE_SEED,
    }  # fmt: skip
