"""DEPO (Difficulty-Estimated Policy Optimization, arXiv 2602.06375) for OpenRLHF."""

__version__ = "0.1.0"
