"""`python -m moejax.eval`: see `moejax.commands.eval`."""

from moejax.commands.eval import main

if __name__ == "__main__":
    raise SystemExit(main())
