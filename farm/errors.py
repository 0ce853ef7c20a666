"""What can go wrong, by what is to be done about it."""


class Failure(Exception):
    """Something the person at the keyboard can act on; shown as one sentence."""


class PromptFailed(Exception):
    """ComfyUI refused the prompt or a node raised an error: it would fail in the same way anywhere."""


class ServerLost(Exception):
    """The server died, hung or was interrupted: the prompt may well succeed elsewhere."""
