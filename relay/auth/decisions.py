"""Decisions on users that are under way, and the orders that overtake them.

Owns which order came after which decision had begun; must not know who decides, nor what.
"""


class Decisions:
    """Decisions on users that are under way, and the orders that came after one of them had begun.

    A join or a handshake that takes its time may have looked at its user before an order came. An order raises the
    generation of its user, or of a user on one topic; it is kept only as long as a decision that began before it.
    """

    __slots__ = ("_generation", "_orders", "_under_way")

    def __init__(self) -> None:
        self._generation = 0
        # Both in ascending order of generations: how many decisions began in it; which one an order began.
        self._under_way: dict[int, int] = {}
        self._orders: dict[tuple[str, str], int] = {}

    def begin(self) -> int:
        """Begin a decision; returns what `overtaken` and `end` are to be given."""
        self._under_way[self._generation] = self._under_way.get(self._generation, 0) + 1
        return self._generation

    def end(self, began: int) -> None:
        """End a decision, whatever has become of it."""
        self._under_way[began] -= 1
        if self._under_way[began]:
            return
        del self._under_way[began]
        if not self._under_way:
            self._orders.clear()
            return
        oldest = next(iter(self._under_way))
        while self._orders and self._orders[first := next(iter(self._orders))] <= oldest:
            del self._orders[first]

    def order(self, user: str, topic: str = "") -> None:
        """Overtake the decisions under way on a user, or with a ``topic`` on this user's joins there alone."""
        if self._under_way:
            self._generation += 1
            _ = self._orders.pop((user, topic), None)
            self._orders[user, topic] = self._generation

    def overtaken(self, began: int, user: str | None, topic: str = "") -> bool:
        """Say whether an order for ``user`` came after a decision had begun: about everything, or about ``topic``."""
        if not self._orders or user is None:
            return False
        return max(self._orders.get((user, ""), 0), self._orders.get((user, topic), 0)) > began

    def __len__(self) -> int:
        """Orders that are kept."""
        return len(self._orders)
