"""Real graphs with one thing changed, and what becomes of them: `python -m tests.mutations`."""
