"""Optimizers that balance updates: PUB and its relatives, their rules, states and graphs."""
