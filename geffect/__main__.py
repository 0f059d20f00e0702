"""The command `geffect`, also as `python -m geffect`: what is imported may be interrupted too."""

import sys


def main() -> None:
    """Run the command line; a Ctrl-C while it is imported ends with a line as any other does."""
    try:
        from geffect.cli.main import main as run

        run()
    except KeyboardInterrupt:
        if sys.stderr is not None:
            sys.stderr.write("geffect: Interrupted.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
