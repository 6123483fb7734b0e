"""`voicetx`, also as `python -m voicetx`: the entry point, which takes Ctrl-C from the first moment on."""

import sys


def main() -> None:
    """Run the command that was typed."""
    try:
        # Imported here: it takes a while, during which somebody may change their mind.
        from voicetx import cli  # noqa: PLC0415

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
