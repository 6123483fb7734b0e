"""`python -m voicetx` is `voicetx`."""

from voicetx.cli import main

main()
