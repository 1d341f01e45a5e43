"""`python -m portkit`: the command line, for an environment that is not activated."""

from portkit.cli import main

if __name__ == "__main__":
    main()
