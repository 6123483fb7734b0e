"""The HTTP endpoints, one module a resource: thin adapters between requests and the modules below."""
