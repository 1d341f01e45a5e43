"""Diagnose any port, at any step: what is right, what is wrong first, and which edit heals it."""
