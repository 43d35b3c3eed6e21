"""`python -m moejax.tokenizer`."""

from moejax.commands.tokenizer import main

if __name__ == "__main__":
    raise SystemExit(main())
