"""`python -m moejax X ...`, the same as `moejax X ...`."""

from moejax.commands.main import main

raise SystemExit(main())
