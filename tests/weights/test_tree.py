from hypothesis import given
from hypothesis import strategies as st

from asyncrl.weights.tree import Tree


def made(fanout: int, *nodes: str) -> Tree:
    """Receivers "a0", "a1", … on node "a", as many as it is named."""
    tree, counts = Tree(fanout), dict.fromkeys(nodes, 0)
    for node in nodes:
        tree.put(f"{node}{counts[node]}", node)
        counts[node] += 1
    return tree


def test_each_node_is_reached_once_and_the_publisher_serves_few() -> None:
    tree = made(2, *"aabbccddee")
    heads = {name: tree.source(name) for name in ("a0", "b0", "c0", "d0", "e0")}
    assert heads == {"a0": None, "b0": None, "c0": "a0", "d0": "a0", "e0": "b0"}
    assert [tree.source(f"{node}1") for node in "abcde"] == ["a0", "b0", "c0", "d0", "e0"]
    assert tree.guests("a0") == ["a1", "c0", "d0"]
    assert tree.guests("b0") == ["b1", "e0"]
    assert tree.guests("a1") == []
    assert (tree.source("unknown"), tree.guests("unknown")) == (None, [])


def test_who_leaves_is_replaced_by_one_of_its_node_or_by_the_last() -> None:
    tree = made(1, *"aabcd")
    assert [tree.source(f"{node}0") for node in "abcd"] == [None, "a0", "b0", "c0"]
    tree.remove("a0")
    assert [tree.source(name) for name in ("a1", "b0")] == [None, "a1"]
    tree.remove("a1")
    assert [tree.source(name) for name in ("d0", "b0", "c0")] == [None, "d0", "b0"]
    tree.put("b0", "elsewhere")  # it moved, and is the last now
    assert [tree.source(name) for name in ("d0", "c0", "b0")] == [None, "d0", "c0"]


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 5), st.booleans()), max_size=60),
)
def test_everybody_is_reached_from_the_publisher_whoever_comes_and_goes(
    fanout: int, moves: list[tuple[str, int, bool]]
) -> None:
    tree, there = Tree(fanout), {}
    for name, node, comes in moves:
        before = {each: tree.source(each) for each in there}
        if comes:
            tree.put(name, f"node-{node}")
            there[name] = node
        else:
            tree.remove(name)
            there.pop(name, None)
        sources = {each: tree.source(each) for each in there}
        for each, node in there.items():
            way = [each]
            while (source := sources[way[-1]]) is not None:
                assert way[-1] in tree.guests(source)
                way.append(source)
                assert len(way) <= len(there)
            assert sum(there[member] == node for member in way) <= 2  # its head, and itself
        for each in there:
            others = [guest for guest in tree.guests(each) if there[guest] != there[each]]
            assert len(others) <= fanout
        assert sum(source is None for source in sources.values()) <= fanout
        moved = [each for each in sources if each != name and before.get(each) not in (sources[each], name)]
        assert len({there[each] for each in moved}) <= 2 + fanout  # the one that fills the gap, and whom it served
