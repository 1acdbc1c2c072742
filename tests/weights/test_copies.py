"""What a version costs on its way from the learner's tensors into a model: how often its bytes are copied and verified."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from asyncrl.models.loading import load_weights
from asyncrl.models.memory import WeightMemory
from asyncrl.types import Version
from asyncrl.weights.messages import Manifest

NBYTES = 1 << 18


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that the bus copied, and that it made checksums of, at both ends."""
    done: Counter[str] = Counter()
    write, checksum = WeightMemory.write, Manifest.checksum

    def copied(memory: WeightMemory, offset: int, data: memoryview) -> None:
        done["copied"] += len(data)
        write(memory, offset, data)

    def summed(manifest: Manifest, index: int, payload: memoryview) -> int:
        done["summed"] += len(payload)
        return checksum(manifest, index, payload)

    monkeypatch.setattr(WeightMemory, "write", copied)
    monkeypatch.setattr(Manifest, "checksum", summed)
    return done


@pytest.mark.parametrize(("transport", "copies", "sums"), [("auto", 1, 0), ("tcp", 3, 3)])
def test_bytes_are_copied_once_and_to_every_other_node_and_summed_as_often_where_there_is_a_wire(
    bus: Any, work: Counter[str], transport: str, copies: int, sums: int
) -> None:
    layers = torch.nn.ParameterList([torch.full((NBYTES // 16,), float(index)) for index in range(4)])
    source = bus.publisher(transport=transport, bucket_bytes=10_000)
    source.publish(Version(1, 1), {name: tensor.detach() for name, tensor in layers.named_parameters()})
    for _ in range(2):
        model = torch.nn.ParameterList([torch.zeros_like(tensor) for tensor in layers])
        found = bus.subscriber(source, transport=transport).next(None, 20.0)
        load_weights(model, found[1])
    assert work == Counter(copied=copies * NBYTES, summed=sums * NBYTES)
    assert [tensor.data_ptr() for tensor in model] == [tensor.data_ptr() for tensor in found[1].values()]
    assert all(torch.equal(one, other) for one, other in zip(model, layers, strict=True))


def test_weights_in_use_outlive_the_bus_and_the_next_version(bus: Any, memories: Callable[[], int]) -> None:
    source = bus.publisher(transport="tcp")
    subscriber = bus.subscriber(source, transport="tcp")
    models, held = [], None
    for update in range(3):
        source.publish(Version(1, update), {"0": torch.full((5000,), float(update))})
        held, tensors = subscriber.next(held, 20.0)
        models.append(torch.nn.ParameterList([torch.zeros(5000)]))
        load_weights(models[-1], tensors)
    del tensors
    subscriber.close()
    source.close()
    assert [model[0].unique().tolist() for model in models] == [[0.0], [1.0], [2.0]]
    assert memories() == 3
    models.clear()
    assert memories() == 0
