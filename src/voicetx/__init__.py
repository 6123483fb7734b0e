"""voicetx: the service that campaign dialers report the outcome of every call to."""

from importlib.metadata import version

__version__ = version("voicetx")
