"""Stage 5: publishing to Feast, reading back, looking up."""
