"""Who takes weights from whom, so that a version crosses to every node once and the publisher sends few of them. Pure.

publisher ──► head of a node ──► heads of `fanout` other nodes ──► …
                   └► the other receivers of its node, which open its memory
"""

from collections import defaultdict


class Tree:
    """Receivers by name. The publisher serves `fanout` heads of nodes itself, and so does every head, besides its own node.

    Who comes or goes moves one other head at the most: the last one, into the place that became free.
    """

    def __init__(self, fanout: int) -> None:
        self._fanout = fanout
        self._nodes: dict[str, str] = {}  # by receiver
        self._members = defaultdict[str, list[str]](list)  # by node; the first is its head
        self._order: list[str] = []  # nodes; those that the publisher serves come first
        self._place: dict[str, int] = {}  # in that order, by node

    def put(self, name: str, node: str) -> None:
        """A receiver is on this node, and passes on what it gets."""
        if self._nodes.get(name) == node:
            return
        self.remove(name)
        self._nodes[name] = node
        if not self._members[node]:
            self._place[node] = len(self._order)
            self._order.append(node)
        self._members[node].append(name)

    def remove(self, name: str) -> None:
        """A receiver is gone, or passes nothing on any more. Harmless for one that is unknown."""
        if (node := self._nodes.pop(name, None)) is None:
            return
        self._members[node].remove(name)
        if self._members[node]:
            return
        place, last = self._place.pop(node), self._order.pop()
        del self._members[node]
        if last != node:
            self._order[place], self._place[last] = last, place

    def source(self, name: str) -> str | None:
        """The receiver that this one takes versions from; None: the publisher."""
        if (node := self._nodes.get(name)) is None:
            return None
        if (head := self._members[node][0]) != name:
            return head
        parent = self._place[node] // self._fanout - 1
        return self._members[self._order[parent]][0] if parent >= 0 else None

    def guests(self, name: str) -> list[str]:
        """Who takes versions from this receiver."""
        node = self._nodes.get(name)
        if node is None or self._members[node][0] != name:
            return []
        begin = (self._place[node] + 1) * self._fanout
        return self._members[node][1:] + [self._members[other][0] for other in self._order[begin : begin + self._fanout]]
