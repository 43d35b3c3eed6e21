"""The one exception for a user's mistake."""


class MoejaxError(ValueError):
    """Something the user can put right: a bad file, config, mesh, prompt or flag.

    The message is one line that names the values and the remedy. Command lines print it after
    `error: ` and exit with code 2; every other exception keeps its traceback, because it is a bug.
    """
