"""The contract of a transform."""


def check_transform() -> None:
    """Placeholder until the contract suite moves here."""
    raise NotImplementedError
