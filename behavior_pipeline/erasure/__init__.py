"""Erasing users from everywhere below a home."""
