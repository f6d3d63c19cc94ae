"""Stage 6: what an embedding is worth: tasks, baselines, probes, segments, the report."""
