"""`python -m moejax.train`: see `moejax.commands.train`."""

from moejax.commands.train import main

if __name__ == "__main__":
    raise SystemExit(main())
