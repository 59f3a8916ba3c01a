"""Parley beside other servers over the same stub models: `python -m benchmarks.peers`."""
