"""The counts that reports are made of, kept while updates are recorded."""
