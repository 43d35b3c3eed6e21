"""`python -m moejax.generate`: see `moejax.commands.generate`."""

from moejax.commands.generate import main

if __name__ == "__main__":
    raise SystemExit(main())
