"""The dashboard: pages for people who run a campaign, rendered on the server, that change as updates come in."""
