"""The served program: its HTTP, the short way of an update, and its processes."""
