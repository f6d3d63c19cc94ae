"""Stage 2: events become token sequences under a frozen vocabulary."""
