"""`python -m moejax.twin`: see `moejax.commands.twin`."""

from moejax.commands.twin import main

if __name__ == "__main__":
    raise SystemExit(main())
