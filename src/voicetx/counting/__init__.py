"""The counts behind the reports, kept up to date while updates are recorded."""
