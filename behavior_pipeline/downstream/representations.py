"""What a probe sees of a user: RFM, an embedding, both, or one of two controls."""

from __future__ import annotations

from typing import Final

from behavior_pipeline.downstream.blocks import Block, Blocks, random_vectors
from behavior_pipeline.downstream.users import Population
from behavior_pipeline.downstream.vectors import load_vectors, open_vectors
from behavior_pipeline.errors import PipelineError
from behavior_pipeline.storage import Storage

REPRESENTATIONS: Final = ("random", "untrained", "rfm", "embedding", "rfm+embedding")
BASELINE: Final = "rfm"
CONTROLS: Final = ("random", "untrained")


def build_representations(
    storage: Storage, population: Population, seed: int
) -> tuple[dict[str, Blocks], str]:
    """Return every representation of the users of a population, and the embedding's checkpoint.

    Memory is two vectors per user of the population, which `max_probe_users` bounds.

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
    embedding = Block("vector", load_vectors(folder, population.user_ids))
    noise = random_vectors(population.user_ids, population.cutoff, folder.width, seed)
    representations: dict[str, Blocks] = {
        "random": (Block("vector", noise),),
        "untrained": (Block("vector", load_vectors(control, population.user_ids)),),
        "rfm": (rfm,),
        "embedding": (embedding,),
        "rfm+embedding": (rfm, embedding),
    }
    return representations, folder.checkpoint_id
