"""The one base of errors that say: something given by the user cannot be used."""


class InputError(ValueError):
    """The message names what is wrong, where, and what to do. `started`: whether a job was already under way."""

    started = False


class CheckpointError(InputError):
    """A checkpoint that cannot be used: the message names the file, what is wrong with it and what to do."""
