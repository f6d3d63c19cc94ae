"""Drift, night by night: figures, their history, alarms calibrated on it, and verdicts."""
