import pyarrow as pa
import pyarrow.parquet as pq
import pytest

QUESTIONS = ["2 + 2?", "3 + 4?", "What is 40 + 2?"]
ANSWERS = ["4", "7", "42"]


@pytest.fixture
def gsm8k(tmp_path):
    """A file as verl's `examples/data_preprocess/gsm8k.py` writes it."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": question}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"split": "train", "index": index, "answer": answer, "question": question},
        }
        for index, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def encode():
    """One token per character; a chat prompt gets one more for the opened turn."""

    def encode(prompt):
        text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt) + "\n"
        return [ord(character) for character in text]

    return encode
