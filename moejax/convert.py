"""`python -m moejax.convert`: see `moejax.commands.convert`."""

from moejax.commands.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
