"""Turns raw behavioural events into one reusable user embedding, every night."""

__version__ = "0.1.0"
