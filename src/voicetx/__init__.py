"""voicetx: the service that campaign dialers report the outcome of every call to."""
