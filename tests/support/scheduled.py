"""A request as acted-out engines schedule it."""

from typing import Any

from tests.support.tiny import END


class Request:
    """One answer while it is decoded."""

    def __init__(self, key: str, prompt: list[int], guidance: dict[str, Any] | None, wanted: int) -> None:
        self.key, self.prompt, self.guidance, self.wanted = key, prompt, guidance, wanted
        self.output: list[int] = []
        self.read = 0
        """Tokens of the prefill that the base has read."""

    @property
    def is_done(self) -> bool:
        return len(self.output) == self.wanted or END in self.output

    def take(self, tokens: list[int]) -> None:
        """Tokens of a step, up to where the answer ends."""
        for token in tokens:
            if not self.is_done:
                self.output.append(token)
