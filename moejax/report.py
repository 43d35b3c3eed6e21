"""`python -m moejax.report`: see `moejax.commands.report`."""

from moejax.commands.report import main

if __name__ == "__main__":
    raise SystemExit(main())
