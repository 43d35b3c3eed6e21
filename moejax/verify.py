"""`python -m moejax.verify`: see `moejax.commands.verify`."""

from moejax.commands.verify import main

if __name__ == "__main__":
    raise SystemExit(main())
