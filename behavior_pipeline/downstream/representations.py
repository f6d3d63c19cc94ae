"""What a probe sees of a user: RFM, aggregates, an embedding, both, or one of two controls."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from behavior_pipeline.downstream.blocks import Block, Blocks, random_vectors
from behavior_pipeline.downstream.users import Population
from behavior_pipeline.downstream.vectors import load_vectors, open_vectors
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import Storage

REPRESENTATIONS: Final = (
    "random",
    "untrained",
    "rfm",
    "aggregates",
    "embedding",
    "rfm+embedding",
    "aggregates+embedding",
)
BASELINE: Final = "rfm"
STRONG_BASELINE: Final = "aggregates"
CONTROLS: Final = ("random", "untrained")


def build_representations(
    storage: Storage, population: Population, aggregates: NDArray[np.float64], seed: int
) -> tuple[dict[str, Blocks], str]:
    """Return every representation of the users of a population, and the embedding's checkpoint.

    `aggregates` are the users' (N, F) features. Memory beside them is two vectors per user of the
    population, which `max_probe_users` bounds.

    Raises:
        PipelineError: if embeddings are missing for a user, or of mixed checkpoints.
    """
    folder = open_vectors(storage.embeddings(population.cutoff))
    control = open_vectors(storage.control_embeddings(population.cutoff))
    if control.width != folder.width:
        raise PipelineError(
            f"The untrained encoder is {control.width} wide, the trained one {folder.width}.",
            "Embed this cutoff again: the control must have the trained encoder's shape.",
        )
    rfm = Block("rfm", population.rfm)
    features = Block("aggregates", aggregates)
    embedding = Block("vector", load_vectors(folder, population.user_ids))
    noise = random_vectors(population.user_ids, population.cutoff, folder.width, seed)
    representations: dict[str, Blocks] = {
        "random": (Block("vector", noise),),
        "untrained": (Block("vector", load_vectors(control, population.user_ids)),),
        "rfm": (rfm,),
        "aggregates": (features,),
        "embedding": (embedding,),
        "rfm+embedding": (rfm, embedding),
        "aggregates+embedding": (features, embedding),
    }
    return representations, folder.checkpoint_id
