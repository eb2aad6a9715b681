"""The difficulty estimator, a plain object without Ray."""
