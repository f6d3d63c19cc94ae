"""One service per consumer: what a model version or an application reads.

Several views carry `cutoff_at` and `checkpoint_id`: ask with `full_feature_names=True`.
"""

from __future__ import annotations

from feast import FeatureService
from views import user_embedding, user_predictions, user_rfm, user_segment

churn_model = FeatureService(
    name="churn_model",
    features=[
        user_embedding[["cutoff_at", "embedding", "checkpoint_id", "is_cold_start"]],
        user_rfm[["cutoff_at", "recency_days", "frequency", "monetary"]],
    ],
    description="Inputs of a churn model: the embedding beside RFM.",
    tags={"consumer": "model"},
    owner="behavior-pipeline",
)

personalization = FeatureService(
    name="personalization",
    features=[
        user_embedding[["cutoff_at", "embedding", "checkpoint_id", "is_cold_start"]],
        user_predictions[["cutoff_at", "top_target", "top_target_probability", "next_event_type"]],
        user_segment[["cutoff_at", "segment", "segment_name"]],
    ],
    description="What a page needs to greet a user: vector, likely target, segment.",
    tags={"consumer": "application"},
    owner="behavior-pipeline",
)

user_profile = FeatureService(
    name="user_profile",
    features=[user_embedding, user_rfm, user_predictions, user_segment],
    description="Everything that is known of a user; `behavior-pipeline lookup` reads it.",
    tags={"consumer": "people"},
    owner="behavior-pipeline",
)
