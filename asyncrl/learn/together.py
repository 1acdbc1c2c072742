"""A folder that the learner's ranks write together, from any thread and without a collective: whole, or not there.

first rank:   a folder beside ─► its files ─► what the others wrote ─► finish ─► renamed
rank r:           └─► its files, and what it says of them ───┘
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from asyncrl.learn.snapshot import copies_to_write
from asyncrl.models.loading import export
from asyncrl.models.lora import merged_pieces
from asyncrl.models.ranks import Ranks
from asyncrl.models.stored import StoredTensors
from asyncrl.rundir import atomic_folder

Said = dict[str, Any]  # JSON values
TIMEOUT_S = 3600.0  # for the slowest rank; one that dies ends them all, which is noticed elsewhere


def write_together(
    path: Path,
    ranks: Ranks,
    count: int,
    about: str,
    write: Callable[[Path], Said],
    finish: Callable[[Path, Said], None],
    needed_bytes: int = 0,
) -> None:
    """Each of the first `count` ranks calls this with the same `path`, and writes its files into the folder that `write` is
    given.

    finish: the first rank's last touch, with what all writes returned. It alone waits for the others, and replaces an older
    `path`. about: names this folder, once for ever. Raises what a write raised; on the first rank then OSError, or DiskFull.
    """
    if not ranks.first:
        _follow(ranks, about, write)
        return
    try:
        with atomic_folder(path, needed_bytes) as folder:
            ranks.tell(f"{about}/folder", str(folder))
            said = write(folder)
            for rank in range(1, count):
                said |= _said_by(rank, ranks, about)
            finish(folder, said)
    except BaseException:
        ranks.tell(f"{about}/folder", "")  # nobody need wait for it
        raise


def _follow(ranks: Ranks, about: str, write: Callable[[Path], Said]) -> None:
    folder = ranks.heard(f"{about}/folder", 0, TIMEOUT_S)
    if not folder:
        return  # the first rank has given it up, and says why
    try:
        said: Any = write(Path(folder))
    except Exception as error:
        said = str(error)
        raise
    finally:
        ranks.tell(f"{about}/written", json.dumps(said))


def _said_by(rank: int, ranks: Ranks, about: str) -> Said:
    said = json.loads(ranks.heard(f"{about}/written", rank, TIMEOUT_S))
    if isinstance(said, str):
        raise OSError(f"rank {rank} of the learner could not write its part: {said}")
    return dict(said)


def export_together(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, ranks: Ranks, about: str) -> None:
    """Writes a policy as a Hugging Face folder, adapters merged, tokenizer included; whole, or not at all.

    All ranks must call it. Each of several writes its pieces; the first, which alone waits for the others, makes the folder of
    them, with the whole model in its host's memory. about: names this export, once for ever.
    """
    pieces = merged_pieces(model, ranks)
    if ranks.layout.ranks == 1:
        with atomic_folder(folder) as beside:
            export(model, tokenizer, beside, weights={piece.name: piece.read() for piece in pieces})
        return
    tensors, metadata = copies_to_write([piece._replace(local=piece.read()) for piece in pieces])

    def write(beside: Path) -> Said:
        (beside / "pieces").mkdir(exist_ok=True)
        save_file(tensors, beside / "pieces" / f"{ranks.index}.safetensors", metadata)
        return {}

    def finish(beside: Path, _: Said) -> None:
        whole = dict(StoredTensors(beside / "pieces"))
        shutil.rmtree(beside / "pieces")
        export(model, tokenizer, beside, weights=whole)

    write_together(folder, ranks, ranks.layout.ranks, about, write, finish)
