"""Stage 3: the behavioural transformer, its objectives, training and checkpoints."""
