"""``python -m prehab_export``: the command line, where its script is not on the path."""

from prehab_export.cli import main

if __name__ == "__main__":
    main()
