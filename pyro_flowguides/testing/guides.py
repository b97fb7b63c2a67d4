"""The contract of a guide."""


def check_guide() -> None:
    """Placeholder until the contract suite moves here."""
    raise NotImplementedError
