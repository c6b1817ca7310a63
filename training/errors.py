"""What a user's mistake is called, wherever it is found."""


class ConfigError(ValueError):
    """A configuration that can't be run; the message is one line for its author."""
