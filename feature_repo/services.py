"""One service per consumer: what a model version or an application reads.

Every service exists once per version: `churn_model_v2` means that version for ever, so that one
read never mixes two checkpoints, whatever is promoted meanwhile. `churn_model` is the same of the
live version: get it anew for each read (see docs/versions.md).

Features of a service have different names, except in `user_profile`: ask for that one with
`full_feature_names=True`, and the names tell the version, `user_embedding@v2__embedding`.
"""

from __future__ import annotations

from feast import FeatureService, FeatureView
from sources import version
from views import similar_users, user_embedding, user_predictions, user_rfm, user_segment


def _pinned(service: FeatureService) -> FeatureService:
    """Return the service under a name that means this version for ever."""
    return FeatureService(
        name=f"{service.name}_v{version}",
        features=list(service._features),  # noqa: SLF001 - Feast has no reader for them
        description=f"{service.description} Version {version}, whichever is live.",
        tags=service.tags,
        owner=service.owner,
    )


def _service(
    name: str, consumer: str, description: str, features: list[FeatureView]
) -> FeatureService:
    """Return the service of a consumer."""
    return FeatureService(
        name=name,
        features=features,
        description=description,
        tags={"consumer": consumer},
        owner="behavior-pipeline",
    )


churn_model = _service(
    "churn_model",
    "model",
    "Inputs of a churn model: the embedding beside RFM.",
    [
        user_embedding[["cutoff_at", "embedding", "checkpoint_id", "is_cold_start"]],
        user_rfm[["recency_days", "frequency", "monetary"]],
    ],
)

personalization = _service(
    "personalization",
    "application",
    "What a page needs to greet a user: vector, likely target, segment.",
    [
        user_embedding[["cutoff_at", "embedding", "checkpoint_id", "is_cold_start"]],
        user_predictions[["top_target", "top_target_probability", "next_event_type"]],
        user_segment[["segment", "segment_name"]],
    ],
)

training_set = _service(
    "training_set",
    "model",
    "What `behavior-pipeline training-set` puts beside labels.",
    [user_embedding, user_rfm, user_predictions],
)

lookalikes = _service(
    "lookalikes",
    "application",
    "Whom else to show what a user liked: the nearest neighbours.",
    [similar_users],
)

user_profile = _service(
    "user_profile",
    "people",
    "Everything that is known of a user; `behavior-pipeline lookup` reads it.",
    [user_embedding, user_rfm, user_predictions, user_segment, similar_users],
)

churn_model_pinned = _pinned(churn_model)
personalization_pinned = _pinned(personalization)
lookalikes_pinned = _pinned(lookalikes)
training_set_pinned = _pinned(training_set)
user_profile_pinned = _pinned(user_profile)
