"""Stage 0: raw files become canonical events; what breaks the contract goes to quarantine."""
