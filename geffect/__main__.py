"""`python -m geffect`: the command line, where its script is not on the path."""

from geffect.cli.main import main

if __name__ == "__main__":
    main()
