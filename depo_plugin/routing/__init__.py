"""Routing by difficulty: the small model answers what it can, the large model the rest (`depo route`)."""
