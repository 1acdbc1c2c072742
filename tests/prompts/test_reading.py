import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from asyncrl.config import DataSpec
from asyncrl.errors import DataError
from asyncrl.prompts.reading import check_columns, read_rows


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


def spec(*files, **fields):
    return DataSpec(files=tuple(map(str, files)), **fields)


def test_verl_parquet_as_it_is(gsm8k):
    rows = list(read_rows(spec(gsm8k)))
    assert [row.row for row in rows] == [0, 1, 2]
    assert rows[2].prompt == [{"role": "user", "content": "What is 40 + 2?"}]
    assert rows[2].data_source == "openai/gsm8k"
    assert rows[2].ground_truth == "42"
    assert rows[2].extra_info == {"split": "train", "index": 2, "answer": "42", "question": "What is 40 + 2?"}


def test_jsonl_with_other_keys_plain_prompts_and_no_source(jsonl):
    path = jsonl({"question": "1+1=", "label": 2}, "", {"question": "1+2=", "label": {"value": [3]}}, name="sums.jsonl")
    rows = list(read_rows(spec(path, prompt_key="question", answer_key="label", source_key="")))
    assert [(row.prompt, row.ground_truth, row.data_source, row.extra_info) for row in rows] == [
        ("1+1=", 2, "sums", None),
        ("1+2=", {"value": [3]}, "sums", None),
    ]


def test_without_an_answer_key_there_is_no_ground_truth(jsonl):
    [row] = read_rows(spec(jsonl({"prompt": "hi", "data_source": "chat"}), answer_key=""))
    assert row.ground_truth is None


def test_a_column_whose_name_holds_a_dot_wins_over_the_path(jsonl):
    path = jsonl({"prompt": "hi", "data_source": "s", "reward_model.ground_truth": "flat"})
    assert next(read_rows(spec(path))).ground_truth == "flat"


def test_rows_count_over_all_files(gsm8k, jsonl):
    other = jsonl({"prompt": "x", "data_source": "s", "reward_model": {"ground_truth": "y"}})
    assert [(row.row, row.data_source) for row in read_rows(spec(gsm8k, other))][2:] == [(2, "openai/gsm8k"), (3, "s")]


def test_many_batches_stream_in_order(tmp_path):
    path = tmp_path / "many.parquet"
    table = pa.table({"prompt": [f"p{i}" for i in range(3000)], "answer": range(3000), "big": ["x" * 100] * 3000})
    pq.write_table(table, path, row_group_size=700)
    rows = list(read_rows(spec(path, answer_key="answer", source_key="")))
    assert [row.ground_truth for row in rows] == list(range(3000))


GOOD = {"prompt": "p", "data_source": "s", "reward_model": {"ground_truth": "g", "style": "rule"}}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            {"promt": "p"},
            ["line 2", "no column 'prompt' (data.prompt_key='prompt')", "columns found: promt", "did you mean 'promt'"],
        ),
        (
            GOOD | {"reward_model": {"groundtruth": 1}},
            ["'reward_model' has no field 'ground_truth'", "did you mean 'groundtruth'"],
        ),
        (GOOD | {"reward_model": None}, ["'reward_model' is null", "data.answer_key='reward_model.ground_truth'"]),
        (
            {"prompt": "p", "reward_model": {"ground_truth": 1}},
            ["no column 'data_source'", "columns found: prompt, reward_model"],
        ),
        (GOOD | {"data_source": 3}, ["(data.source_key) is int '3'; expected a string"]),
        (GOOD | {"prompt": None}, ["'prompt' (data.prompt_key) is null"]),
        (GOOD | {"prompt": ""}, ["is an empty str"]),
        (GOOD | {"prompt": []}, ["is an empty list; expected a non-empty string or a list of chat messages"]),
        (GOOD | {"prompt": 7}, ["is int '7'"]),
        (GOOD | {"prompt": ["hi"]}, ["message 0 is str 'hi'"]),
        (GOOD | {"prompt": [{"role": "user"}]}, ["message 0 has content=null, fields found: role"]),
        (GOOD | {"prompt": [{"role": "user", "content": "a"}, {"role": 1, "content": "b"}]}, ["message 1 has role=int '1'"]),
        ('{"prompt": ', ["line 2 is not JSON"]),
        ("[1, 2]", ["line 2 holds a list; write one object per line"]),
    ],
)
def test_a_malformed_line_is_named(jsonl, line, words):
    path = jsonl(GOOD, line)
    with pytest.raises(DataError) as caught:
        list(read_rows(spec(path)))
    for word in [f"{path}, line 2", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(("encoding", "line", "byte", "found"), [("latin-1", 2, 13, "0xe9"), ("utf-16", 1, 1, "0xff")])
def test_a_file_in_another_encoding_is_named_with_line_byte_and_fix(tmp_path, encoding, line, byte, found):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "é"}\n'.encode(encoding))
    with pytest.raises(DataError, match=rf"{path}, line {line}, byte {byte} is {found}, which is not UTF-8.*`iconv -f latin1"):
        list(read_rows(spec(path, answer_key="", source_key="")))


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "é"}\n'.encode("utf-8-sig"))
    [row] = read_rows(spec(path, answer_key="", source_key=""))
    assert row.prompt == "é"


def test_a_missing_parquet_column_names_row_and_all_columns_found(gsm8k):
    with pytest.raises(DataError) as caught:
        list(read_rows(spec(gsm8k, prompt_key="question")))
    assert f"{gsm8k}, row 0: no column 'question' (data.prompt_key='question')" in str(caught.value)
    assert "columns found: ability, data_source, extra_info, prompt, reward_model" in str(caught.value)


def test_a_null_deep_in_a_parquet_names_its_row(tmp_path):
    path = tmp_path / "holes.parquet"
    pq.write_table(pa.table({"prompt": ["a", None], "answer": ["1", "2"]}), path)
    with pytest.raises(DataError, match=r"row 1: 'prompt' \(data.prompt_key\) is null"):
        list(read_rows(spec(path, answer_key="answer", source_key="")))


def test_files_that_cannot_be_read(gsm8k, tmp_path):
    with pytest.raises(DataError, match=r"no data file .*trian\.parquet; did you mean .*train\.parquet"):
        list(read_rows(spec(tmp_path / "trian.parquet")))
    (tmp_path / "x.csv").write_text("prompt\n")
    with pytest.raises(DataError, match=r"'\.csv' is not known; use \.parquet or \.jsonl"):
        list(read_rows(spec(tmp_path / "x.csv")))
    (tmp_path / "torn.parquet").write_bytes(gsm8k.read_bytes()[:100])
    with pytest.raises(DataError, match=r"torn\.parquet can't be read as parquet"):
        list(read_rows(spec(tmp_path / "torn.parquet")))


def test_checking_reads_the_first_row_of_each_file_only(gsm8k, jsonl):
    good_then_bad = jsonl(GOOD, "not json")
    check_columns([str(gsm8k), str(good_then_bad)], spec(gsm8k))
    with pytest.raises(DataError, match="no column 'question'"):
        check_columns([str(gsm8k)], spec(gsm8k, prompt_key="question"))
    with pytest.raises(DataError, match="holds no rows"):
        check_columns([str(jsonl(name="empty.jsonl"))], spec(gsm8k))


def test_arrow_types_arrive_as_plain_python(tmp_path):
    path = tmp_path / "types.parquet"
    day = datetime.date(2024, 5, 1)
    table = pa.table({"prompt": ["p"], "answer": [[1, None]], "extra_info": [{"day": day, "nested": {"xs": [1.5]}}]})
    pq.write_table(table, path)
    [row] = read_rows(spec(path, answer_key="answer", source_key=""))
    assert row.ground_truth == [1, None]
    assert row.extra_info == {"day": day, "nested": {"xs": [1.5]}}
