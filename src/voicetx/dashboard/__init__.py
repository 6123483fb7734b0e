"""The dashboard: pages for people who run a campaign, rendered here, changing as updates come in."""
