"""Decisions on users that are under way, and the control messages that overtake them.

Owns which control message came after which decision had begun; must not know who decides, nor what.
"""

from collections.abc import Hashable


class Decisions:
    """Decisions on users that are under way, and the control messages that came after one of them had begun.

    A join or a handshake that waits may have looked at its user before the user was disconnected or kicked. Each
    control message raises the generation of its user, or of a user on one topic; it is kept only as long as a decision
    that began before it. The same holds for a socket that is taken out of a topic.
    """

    __slots__ = ("_generation", "_overtaking", "_under_way")

    def __init__(self) -> None:
        self._generation = 0
        # How many decisions began in a generation; and in ascending order, which one a control message began.
        self._under_way: dict[int, int] = {}
        self._overtaking: dict[tuple[Hashable, str], int] = {}

    @property
    def generation(self) -> int:
        """When a decision that is asked for now begins."""
        return self._generation

    def begin(self, generation: int | None = None) -> int:
        """Begin a decision; returns what `overtaken` and `end` are to be given.

        Args: generation: when it was asked for, if it had to wait. Another decision has to be under way since.
        """
        began = self._generation if generation is None else generation
        self._under_way[began] = self._under_way.get(began, 0) + 1
        return began

    def end(self, began: int) -> None:
        """End a decision, whatever has become of it."""
        self._under_way[began] -= 1
        if self._under_way[began]:
            return
        del self._under_way[began]
        if not self._under_way:
            self._overtaking.clear()
            return
        oldest = min(self._under_way)
        while self._overtaking and self._overtaking[first := next(iter(self._overtaking))] <= oldest:
            del self._overtaking[first]

    def overtake(self, user: Hashable, topic: str = "") -> None:
        """Overtake the decisions under way on a user, or with a ``topic`` on this user's joins there alone.

        Args: user: its name; or a socket, with any user.
        """
        if self._under_way:
            self._generation += 1
            _ = self._overtaking.pop((user, topic), None)
            self._overtaking[user, topic] = self._generation

    def overtaken(self, began: int, user: Hashable | None, topic: str = "") -> bool:
        """Say whether ``user`` was disconnected, or kicked from ``topic``, after a decision had begun."""
        if not self._overtaking or user is None:
            return False
        return max(self._overtaking.get((user, ""), 0), self._overtaking.get((user, topic), 0)) > began

    def __len__(self) -> int:
        """Control messages that are kept."""
        return len(self._overtaking)
