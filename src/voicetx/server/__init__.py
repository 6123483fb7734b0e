"""The served program: its HTTP, the fast path of an update, and its processes."""
