"""The estimator in a Ray actor of its own, and the way to it."""
