"""The program that serves: its HTTP protocol, the fast path of an update, and its processes."""
