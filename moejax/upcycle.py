"""`python -m moejax.upcycle`: see `moejax.commands.upcycle`."""

from moejax.commands.upcycle import main

if __name__ == "__main__":
    raise SystemExit(main())
