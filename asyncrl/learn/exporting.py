"""A policy that ranks share, written as one Hugging Face folder."""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from asyncrl.learn.snapshot import copies_to_write
from asyncrl.learn.together import write_together
from asyncrl.models.loading import export
from asyncrl.models.lora import merged_pieces
from asyncrl.models.ranks import Ranks
from asyncrl.models.stored import StoredTensors
from asyncrl.rundir import atomic_folder


def export_together(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, ranks: Ranks, about: str) -> None:
    """Writes `folder`, adapters merged, tokenizer included; whole, or not at all. All ranks must call it.

    Each of several ranks writes its pieces; the first, which alone waits for the others, makes the folder of them, with the
    whole model in its host's memory. about: names this export, once for ever.
    """
    pieces = merged_pieces(model, ranks)
    if ranks.layout.ranks == 1:
        with atomic_folder(folder) as beside:
            export(model, tokenizer, beside, weights={piece.name: piece.read() for piece in pieces})
        return
    tensors, metadata = copies_to_write([piece._replace(local=piece.read()) for piece in pieces])

    def write(beside: Path) -> dict[str, Any]:
        (beside / "pieces").mkdir(exist_ok=True)
        save_file(tensors, beside / "pieces" / f"{ranks.index}.safetensors", metadata)
        return {}

    def finish(beside: Path, _: dict[str, Any]) -> None:
        whole = dict(StoredTensors(beside / "pieces"))
        shutil.rmtree(beside / "pieces")
        export(model, tokenizer, beside, weights=whole)

    write_together(folder, ranks, ranks.layout.ranks, about, write, finish)
