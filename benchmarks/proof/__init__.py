"""Does the policy get better? See `python -m benchmarks.proof --help`."""
