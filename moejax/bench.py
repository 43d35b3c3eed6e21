"""`python -m moejax.bench`: see `moejax.commands.bench`."""

from moejax.commands.bench import main

if __name__ == "__main__":
    raise SystemExit(main())
