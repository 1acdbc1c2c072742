import datetime
import json

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import DataSpec
from asyncrl.errors import DataError
from asyncrl.prompts.dataset import PromptFile, as_record, prepare, to_json
from asyncrl.prompts.reading import DatasetRow
from asyncrl.types import Prompt


@pytest.fixture
def spec(gsm8k):
    return DataSpec(files=(str(gsm8k),))


@pytest.fixture
def counted(encode):
    """The encoder, with the prompts it was asked for."""
    asked = []

    def counting(prompt):
        asked.append(prompt)
        return encode(prompt)

    counting.asked = asked
    return counting


def test_prompts_come_back_as_they_went_in(spec, encode, tmp_path):
    summary = prepare(spec, encode, tmp_path / "data" / "train.arrow", "characters")
    assert (summary.rows, summary.prompts, summary.too_long) == (3, 3, 0)
    prompts = PromptFile(summary.path)
    assert len(prompts) == 3
    assert prompts[1] == Prompt(
        row=1,
        ids=tuple(map(ord, "3 + 4?\n")),
        data_source="openai/gsm8k",
        ground_truth='"7"',
        extra_info='{"split":"train","index":1,"answer":"7","question":"3 + 4?"}',
    )
    assert prompts[-1].row == 2
    assert [prompt.row for prompt in prompts[1:]] == [1, 2]
    assert [prompt.row for prompt in prompts] == [0, 1, 2]
    with pytest.raises(IndexError):
        prompts[3]


def test_prompts_longer_than_the_bound_are_left_out_and_counted(spec, encode, tmp_path):
    exact = msgspec.structs.replace(spec, max_prompt_length=7)  # "2 + 2?" and the opened turn
    summary = prepare(exact, encode, tmp_path / "train.arrow", "characters")
    assert (summary.rows, summary.prompts, summary.too_long) == (3, 2, 1)
    assert [prompt.row for prompt in PromptFile(summary.path)] == [0, 1]


def test_when_nothing_is_left_the_error_tells_the_shortest(spec, encode, tmp_path):
    short = msgspec.structs.replace(spec, max_prompt_length=6)
    with pytest.raises(
        DataError, match=r"all 3 prompts are longer than data.max_prompt_length=6 tokens \(the shortest has 7\)"
    ):
        prepare(short, encode, tmp_path / "train.arrow", "characters")
    assert [path.name for path in tmp_path.iterdir()] == ["train.parquet"]


def test_the_second_time_nothing_is_tokenized(spec, counted, tmp_path):
    out = tmp_path / "train.arrow"
    tight = msgspec.structs.replace(spec, max_prompt_length=7)
    first = prepare(tight, counted, out, "characters")
    second = prepare(msgspec.structs.replace(tight, shuffle=False, epochs=3), counted, out, "characters")
    assert second == first
    assert len(counted.asked) == 3


@pytest.mark.parametrize("change", ["file", "bound", "key", "tokenizer", "torn", "empty"])
def test_any_other_input_is_tokenized_anew(spec, encode, counted, tmp_path, gsm8k, change):
    out, tokenizer = tmp_path / "train.arrow", "characters"
    prepare(spec, encode, out, tokenizer)
    if change == "file":
        table = pa.parquet.read_table(gsm8k).slice(1)
        pa.parquet.write_table(table, gsm8k)
    elif change == "bound":
        spec = msgspec.structs.replace(spec, max_prompt_length=1000)
    elif change == "key":
        spec = msgspec.structs.replace(spec, answer_key="reward_model.style")
    elif change in ("torn", "empty"):
        out.write_bytes(out.read_bytes()[: 300 if change == "torn" else 0])
    else:
        tokenizer = "other"
    prepare(spec, counted, out, tokenizer)
    assert len(counted.asked) == (2 if change == "file" else 3)
    assert PromptFile(out)[0].row == 0
    assert len(PromptFile(out)) == (2 if change == "file" else 3)


def test_an_error_in_the_middle_leaves_the_old_file(spec, encode, tmp_path):
    out = tmp_path / "train.arrow"
    prepare(spec, encode, out, "characters")
    with pytest.raises(DataError, match=r"row 0: the prompt has no tokens"):
        prepare(spec, lambda prompt: [], out, "other")
    assert len(PromptFile(out)) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_positions_hold_over_batches(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * (1 + i % 5), "a": i}) + "\n" for i in range(2500)))
    spec = DataSpec(files=(str(path),), answer_key="a", source_key="", max_prompt_length=4)
    summary = prepare(spec, lambda text: [i for i, _ in enumerate(text)], tmp_path / "many.arrow", "")
    prompts = PromptFile(summary.path)
    kept = [i for i in range(2500) if i % 5 != 4]
    assert [prompt.row for prompt in prompts] == kept
    assert prompts[1500].ground_truth == str(kept[1500])
    assert len(prompts[1500].ids) == 1 + kept[1500] % 5


def test_a_foreign_file_is_a_clear_error(gsm8k):
    with pytest.raises(DataError, match="is not a prepared prompt file"):
        PromptFile(gsm8k)


def test_what_json_holds():
    value = {"a": np.float32(0.5), "b": np.arange(3), "c": None, "d": datetime.date(2024, 5, 1), "e": {"f": [True, "é"]}}
    assert to_json(value) == '{"a":0.5,"b":[0,1,2],"c":null,"d":"2024-05-01","e":{"f":[true,"é"]}}'
    assert to_json(float("nan")) == "null"
    with pytest.raises(TypeError, match="object"):
        to_json(object())


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(plain)
def test_json_round_trips(value):
    assert msgspec.json.decode(to_json(value)) == value


def test_the_whole_row_is_kept_beside_its_prompt(tmp_path, encode):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "1+1 is?" * (1 + 9 * (i == 1)), "label": i, "level": {"grade": i}} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    spec = DataSpec(files=(str(path),), prompt_key="question", answer_key="label", source_key="", max_prompt_length=10)
    prompts = PromptFile(prepare(spec, encode, tmp_path / "train.arrow", "characters").path)
    assert [prompt.row for prompt in prompts] == [0, 2, 3]  # row 1 is too long
    assert [json.loads(prompts.record(row)) for row in (0, 2, 3)] == [rows[i] | {"prompt": "1+1 is?"} for i in (0, 2, 3)]
    assert [prompts.record(row) for row in (1, 4)] == ["{}", "{}"]


def test_a_column_that_json_cannot_hold_is_left_out_of_the_record():
    row = DatasetRow(
        row=0, where="", prompt="1+1", data_source="", ground_truth=None, extra_info=None, columns={"a": 1, "b": 1j}
    )
    assert json.loads(as_record(row)) == {"a": 1, "prompt": "1+1"}
