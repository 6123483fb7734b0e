"""Reports, lists and exports: what became of the calls, for people and programs."""
