"""Stage 4: token sequences become one embedding per user and cutoff."""
