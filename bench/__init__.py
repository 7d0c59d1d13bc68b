"""The benchmark: `python -m bench --help`. Nothing in tinylora imports it."""
