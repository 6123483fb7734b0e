"""Deployments and their transactions: made, loaded, purged and erased."""
