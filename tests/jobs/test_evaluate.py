import argparse
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from asyncrl.config import (
    DataSpec,
    EvaluationSpec,
    JudgeSpec,
    ModelSpec,
    Recipe,
    RewardSpec,
    RewardTerm,
    SamplingSpec,
    ShapingSpec,
)
from asyncrl.config.load import load_recipe
from asyncrl.config.paths import resolve_paths
from asyncrl.errors import ConfigError, DataError
from asyncrl.jobs.evaluate import eval_job
from asyncrl.learn.checkpoint import Checkpoints
from asyncrl.rundir import RunDir
from asyncrl.types import Version

LETTERS = "0123456789+=?"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
ROOT = Path(__file__).resolve().parents[2]
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert "<" not in solution_str, "special tokens must not reach the reward"
    if extra_info["index"] == 2:
        raise ValueError("unreadable")
    return {"score": 0.5, "digits": len(solution_str)}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random Qwen3 with a character tokenizer, as a Hugging Face folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {token: i for i, token in enumerate([*LETTERS, "<end>", "<pad>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokens = {"unk_token": "?", "eos_token": "<end>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **tokens).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        eos_token_id=vocabulary["<end>"],
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    rows = [
        {
            "data_source": "sums" if index < 3 else "other",
            "prompt": [{"role": "user", "content": f"{index}+{index}"}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * index)},
            "extra_info": {"split": "test", "index": index},
        }
        for index in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    return tmp_path / "test.parquet"


@pytest.fixture
def reward(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path / "reward.py"


@pytest.fixture
def judge():
    """An API of a judge that likes what is long, and notes what it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][0]["content"])
            body = json.dumps({"choices": [{"message": {"content": f"score: {len(asked[-1])}"}}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_address[1]}/v1", asked=asked)
        server.shutdown()


def evaluate(*argv):
    parser = argparse.ArgumentParser()
    eval_job(parser)
    args = parser.parse_args([*map(str, argv), "--reward-processes", "1", "--device", "cpu"])
    return args.job(args)


def test_one_json_line_and_every_sample_on_disk(model, data, reward, tmp_path, capsys):
    out = tmp_path / "samples.parquet"
    sampled = ("--n", 2, "--temperature", 1.0, "--max-response-length", 5)
    assert evaluate(model, "--data", data, "--reward", reward, *sampled, "--batch", 3, "--out", out) == 0
    [line] = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["samples"] == 8
    assert report["score"] == pytest.approx(0.375)  # 3 prompts of 0.5, and one that is invalid
    assert report["by_source"] == {"other": pytest.approx(0.5), "sums": pytest.approx(1 / 3)}
    assert (report["invalid"], report["timeout"]) == (2, 0)
    figures = report["estimates"]["overall"]
    assert list(figures) == ["score", "pass@1", "pass@2", "maj@1", "maj@2"]
    # Per prompt 0.5, 0.5, 0, 0.5: s² = 0.0625, standard error 0.125, so 0.375 · 0.625 / 0.125² = 15 draws; z² / 15 = 0.2560973
    # (0.375 + 0.2560973 / 2 ± √(0.375 · 0.625 · 0.2560973 + 0.2560973² / 4)) / 1.2560973
    assert figures["score"] == pytest.approx({"mean": 0.375, "low": 0.1804067, "high": 0.6205642})
    assert figures["pass@2"]["mean"] == 0.0  # half a point is no pass
    assert figures["maj@2"]["mean"] == pytest.approx(0.375)
    assert report["estimates"]["by_source"]["other"]["score"] == {"mean": 0.5, "low": None, "high": None}
    rows = pq.read_table(out).to_pylist()
    assert [(row["row"], row["rollout"]) for row in rows] == [(i, r) for i in range(4) for r in range(2)]
    assert all(f"{row['row']}+{row['row']}" in row["prompt"] for row in rows)
    assert [row["ground_truth"] for row in rows][::2] == ["0", "2", "4", "6"]  # texts, not quoted
    assert report["mean_length"] == sum(row["response_length"] for row in rows) / 8
    assert all(1 <= row["response_length"] <= 5 for row in rows)
    assert {row["score"] for row in rows if row["row"] == 2} == {None}
    assert all("ValueError: unreadable" in row["error"] for row in rows if row["row"] == 2)
    assert all(json.loads(row["parts"]) == {"digits": len(row["response"])} for row in rows if row["row"] != 2)


METRIC = """
def plus(responses):
    assert all(int(one.ground_truth) >= 0 and one.prompt and one.finish_reason for one in responses)
    return {"sevens": sum(one.response.count("7") for one in responses) / 50, "several": float(len(responses) > 1)}
"""


def test_several_settings_in_one_pass_and_a_metric_of_ones_own(model, data, reward, tmp_path, capsys):
    file, out = tmp_path / "metric.py", tmp_path / "samples.parquet"
    file.write_text(METRIC)
    given = (model, "--data", data, "--reward", reward, "--max-response-length", 5, "--metric", f"{file}:plus")
    assert evaluate(*given) == 0
    alone = json.loads(capsys.readouterr().out)
    also = ("--also", "{name: sampled, temperature: 0.7, n: 3, top_k: 5}", "--also", "{name: again}")
    assert evaluate(*given, *also, "--out", out) == 0
    report = json.loads(capsys.readouterr().out)
    sampled, again = report.pop("sampled"), report.pop("again")
    assert report == alone
    assert {**again, "n": 1} == {key: alone[key] for key in again}  # greedy as well
    assert (report["samples"], sampled["samples"], sampled["n"], sampled["temperature"]) == (4, 12, 3, 0.7)
    assert {"pass@1", "pass@2", "pass@3", "maj@3", "metric/sevens"} <= sampled["estimates"]["overall"].keys()
    rows = pq.read_table(out).to_pylist()
    assert [row["setting"] for row in rows] == [""] * 4 + ["sampled"] * 12 + ["again"] * 4
    for setting, figures in (("", report), ("sampled", sampled)):
        sevens = [row["response"].count("7") for row in rows if row["setting"] == setting]
        assert figures["estimates"]["overall"]["metric/sevens"]["mean"] == pytest.approx(sum(sevens) / 50 / 4)
        assert figures["estimates"]["overall"]["metric/several"]["mean"] == float(setting == "sampled")
    file.write_text("def plus(responses):\n    return {'x': float('nan')}\n")
    other = file.rename(tmp_path / "nan.py")
    with pytest.raises(ConfigError, match=r"evaluation\.metrics: plus failed: ValueError: x=nan is not finite"):
        evaluate(*given[:-1], f"{other}:plus")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("{name: a, n: 2}", "greedy decoding would give 2 equal responses"),
        ("{name: a/b}", "names no metrics"),
        ("{name: score}", "is taken"),
        ("{n: 2}", "missing required field `name`"),
        ("[", "write it as"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, data, reward, setting, said):
    with pytest.raises(ConfigError, match=said):
        evaluate(model, "--data", data, "--reward", reward, "--also", setting)


def test_the_same_seed_gives_the_same_samples_and_another_does_not(model, data, reward, tmp_path):
    def responses(name, seed):
        out = tmp_path / f"{name}.parquet"
        evaluate(
            model, "--data", data, "--reward", reward, "--temperature", 1, "--n", 4, "--batch", 5, "--seed", seed, "--out", out
        )
        return pq.read_table(out).column("response").to_pylist()

    first = responses("a", 1)
    assert responses("b", 1) == first
    assert responses("c", 2) != first


def test_the_same_command_gives_the_same_bytes(model, data, reward, tmp_path, capsys):
    command = (model, "--data", data, "--reward", reward, "--temperature", 1, "--n", 2, "--max-response-length", 4)
    written, printed = [], []
    for name in ("a", "b"):
        evaluate(*command, "--out", tmp_path / f"{name}.parquet")
        written.append((tmp_path / f"{name}.parquet").read_bytes())
        printed.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert printed[0] == printed[1]


def test_jsonl_chosen_ks_and_the_score_that_passes(model, reward, tmp_path, capsys):
    path = tmp_path / "test.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i}+{i}=", "label": 2 * i, "extra_info": {"index": i}}) + "\n" for i in (0, 1))
    )
    keys = ("--answer-key", "label", "--source-key", "")
    sampled = ("--n", 3, "--temperature", 1, "--max-response-length", 3, "--k", "3,2", "--pass-score", 0.5)
    evaluate(model, "--data", path, "--reward", reward, *keys, *sampled)
    figures = json.loads(capsys.readouterr().out)["estimates"]
    assert {name: figure["mean"] for name, figure in figures["overall"].items()} == {
        "score": 0.5,
        "pass@2": 1.0,
        "pass@3": 1.0,
        "maj@2": 0.5,
        "maj@3": 0.5,
    }
    assert list(figures["by_source"]) == ["test"]


def test_limit_takes_the_first_prompts(model, data, reward, capsys):
    evaluate(model, "--data", data, "--reward", f"{reward}:compute_score", "--limit", 2)
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["invalid"], report["score"]) == (2, 0, 0.5)


def test_a_run_is_evaluated_at_its_newest_checkpoint_with_its_recipe(model, data, reward, tmp_path, capsys):
    recipe = Recipe(
        name="r",
        model=ModelSpec(path=str(model)),
        data=DataSpec(files=("train.parquet",), answer_key="extra_info.index"),
        reward=RewardSpec(function="a.py:b"),
        sampling=SamplingSpec(max_response_length=3),
        total_steps=1,
    )
    run = RunDir(tmp_path / "run").create()
    run.recipe.write_bytes(msgspec.json.encode(recipe))
    policy = AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(policy.parameters())
    trainer = SimpleNamespace(trained={"policy": SimpleNamespace(module=policy, adamw=optimizer)}, state={})
    checkpoints = Checkpoints(run, keep_last_n=1)
    checkpoints.save(trainer, Version(0, 0))
    checkpoints.wait()
    out = tmp_path / "of_run.parquet"
    evaluate(run.path, "--data", data, "--reward", reward, "--out", out)
    evaluate(model, "--data", data, "--reward", reward, "--max-response-length", 3, "--out", tmp_path / "of_model.parquet")
    rows = pq.read_table(out).to_pylist()
    assert [row["ground_truth"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["response"] for row in rows] == pq.read_table(tmp_path / "of_model.parquet").column("response").to_pylist()
    assert json.loads(capsys.readouterr().out.splitlines()[0])["model"] == str(run.path)


def test_verls_shards_are_a_model_too(model, data, reward, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "actor" / "huggingface")
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    torch.save(weights, tmp_path / "actor" / "model_world_size_1_rank_0.pt")
    given = ("--data", data, "--reward", reward, "--n", 2, "--temperature", 1.0, "--max-response-length", 5)
    for name in (model, tmp_path):
        evaluate(name, *given)
    of_model, of_shards = map(json.loads, capsys.readouterr().out.splitlines())
    assert of_shards == {**of_model, "model": str(tmp_path)}


def run_of(model, data, reward, tmp_path):
    """A run with a first checkpoint, of the model as it is."""
    recipe = Recipe(
        name="r",
        model=ModelSpec(path=str(model)),
        data=DataSpec(files=("train.parquet",)),
        reward=reward,
        evaluation=EvaluationSpec(files=(str(data),)),
        sampling=SamplingSpec(max_response_length=3),
        total_steps=1,
    )
    run = RunDir(tmp_path / "run").create()
    run.recipe.write_bytes(msgspec.json.encode(recipe))
    policy = AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(policy.parameters())
    trainer = SimpleNamespace(trained={"policy": SimpleNamespace(module=policy, adamw=optimizer)}, state={})
    checkpoints = Checkpoints(run, keep_last_n=1)
    checkpoints.save(trainer, Version(0, 0))
    checkpoints.wait()
    return run


def judged(url, path, **fields):
    path.write_text("{response_a} {response_b}" if fields.get("pairwise") else "{response}")
    return RewardTerm(judge=JudgeSpec(prompt=str(path), url=url, **fields))


@pytest.fixture
def classifier(model, tmp_path):
    """A tiny random one that reads as the policy does."""
    folder, config = tmp_path / "likes", AutoConfig.from_pretrained(model)
    torch.manual_seed(1)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def test_a_classifier_and_judges_score_as_in_the_run(model, data, classifier, judge, tmp_path, capsys, caplog):
    """The judge's API gives a point for each character; the one that compares is not asked."""
    terms = (
        RewardTerm(model=ModelSpec(path=str(classifier)), name="rm", weight=2.0),
        judged(judge.url, tmp_path / "long.txt"),
        judged(judge.url, tmp_path / "pair.txt", pairwise=True),
    )
    run, out = run_of(model, data, RewardSpec(functions=terms), tmp_path), tmp_path / "samples.parquet"
    run.rewards.mkdir()
    (run.rewards / "rm.json").write_text(json.dumps({"model": "another"}))
    assert evaluate(run.path, "--n", 2, "--temperature", 1, "--out", out) == 0
    told = capsys.readouterr()
    report, rows = json.loads(told.out), pq.read_table(out).to_pylist()
    assert (len(judge.asked), report["invalid"], report["timeout"]) == (8, 0, 0)
    reads, tokenizer = AutoModelForSequenceClassification.from_pretrained(classifier), AutoTokenizer.from_pretrained(model)
    for row in rows:
        parts = json.loads(row["parts"])
        said = [{"role": "user", "content": f"{row['row']}+{row['row']}"}, {"role": "assistant", "content": row["response"]}]
        ids = tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            assert parts["rm"] == pytest.approx(reads(input_ids=ids).logits[0, 0].item(), abs=1e-5)
        assert parts == {"rm": parts["rm"], "judge/long": len(row["response"])}
        assert row["score"] == pytest.approx(2.0 * parts["rm"] + parts["judge/long"])
        assert json.loads(row["said"]) == {"judge/long": f"score: {len(row['response'])}"}
    assert report["score"] == pytest.approx(sum(row["score"] for row in rows) / 8)
    assert (len(report["rewards"]["rm"].pop("weights")), report["rewards"]["judge/long"]["url"]) == (64, judge.url)
    assert report["rewards"]["rm"]["model"] == str(classifier)
    assert "judge/pair is not asked" in told.err
    assert "reward rm is not what this run began with" in caplog.text


@pytest.mark.parametrize(
    ("url", "fields", "said"),
    [
        ("http://127.0.0.1:1/v1", {}, r"judge.url='http://127.0.0.1:1/v1' can't be reached from here \(.*refused"),
        ("http://127.0.0.1:99999/v1", {}, "can't be reached from here"),
        ("http://127.0.0.1:1/v1", {"key_env": "NO_SUCH_KEY"}, "key_env='NO_SUCH_KEY' is not set here"),
        ("http://127.0.0.1:1/v1", {"pairwise": True}, "nothing but judge/ask, which compares responses of one policy"),
    ],
)
def test_judges_that_can_not_be_asked_are_named_before_anything_is_loaded(model, data, url, fields, said, tmp_path, capsys):
    run = run_of(model, data, RewardSpec(functions=(judged(url, tmp_path / "ask.txt", **fields),)), tmp_path)
    with pytest.raises(ConfigError, match=said):
        evaluate(run.path)
    assert "prompts ×" not in capsys.readouterr().err


def test_a_run_brings_its_rewards_and_its_held_out_files(model, data, reward, tmp_path, capsys):
    path = tmp_path / "trl.py"
    path.write_text("def prompted(prompts, completions, **columns):\n    return [float(len(prompts[0]))]\n")
    terms = (RewardTerm(function=f"{path}:prompted", weight=2.0), RewardTerm(function=f"{reward}:compute_score", weight=4.0))
    run = run_of(model, data, RewardSpec(functions=terms, shaping=ShapingSpec(length_penalty=9.0)), tmp_path)
    evaluate(run.path, "--out", tmp_path / "samples.parquet")
    assert json.loads(capsys.readouterr().out)["data"] == [str(data)]
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert [row["score"] for row in rows] == [4.0, 4.0, None, 4.0]  # 2 × 1 chat message + 4 × 0.5
    parts = json.loads(rows[0]["parts"])
    assert (parts["prompted"], parts["compute_score"]) == (1.0, 0.5)
    assert rows[2]["error"].startswith("compute_score: ValueError: unreadable")


ENVIRONMENT = """
from asyncrl.episodes.environments import Step

class Sums:
    def reset(self, task):
        assert task.purpose == "eval"
        self.left = self.index = task.row["extra_info"]["index"]
        return task.row["prompt"]

    def step(self, reply):
        if self.index == 2:
            raise ValueError("no idea")
        self.left -= 1
        return Step(messages=({"role": "user", "content": "1+1"},), reward=0.25, done=self.left <= 0)
"""
RECIPE = """
from asyncrl import Recipe
from asyncrl.config import DataSpec, EpisodeSpec, EvaluationSpec, ModelSpec, RewardSpec, SamplingSpec

recipe = Recipe(
    name="sums",
    model=ModelSpec(path="none"),
    data=DataSpec(files=("train.parquet",)),
    reward=RewardSpec(function="asyncrl.reward.verify:episode"),
    episode=EpisodeSpec(environment="sums.py:Sums", max_turns=4),
    evaluation=EvaluationSpec(files=("test.parquet",)),
    sampling=SamplingSpec(max_response_length=5),
    total_steps=1,
)
"""


def test_episodes_are_played_scored_and_told(model, data, tmp_path, capsys):
    (tmp_path / "sums.py").write_text(ENVIRONMENT)
    (tmp_path / "recipe.py").write_text(RECIPE)
    run = RunDir(tmp_path / "run").create()
    recipe = resolve_paths(load_recipe(tmp_path / "recipe.py"), run, tmp_path)
    run.recipe.write_bytes(msgspec.json.encode(recipe))
    out = tmp_path / "samples.parquet"
    sampled = ("--n", 2, "--temperature", 1.0, "--pass-score", 0.75, "--batch", 3, "--out", out)
    assert evaluate(model, "--recipe", run.path, *sampled) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["invalid"]) == (8, 2)
    assert report["score"] == (0.25 + 0.25 + 0.0 + 0.75) / 4
    figures = report["estimates"]["overall"]
    assert (figures["pass@2"]["mean"], figures["score"]["mean"]) == (0.25, 0.3125)
    episodes = report["episodes"]
    assert (episodes["num_turns/mean"], episodes["num_turns/max"]) == (1.5, 3.0)
    assert (episodes["episode/stop/done"], episodes["episode/stop/error"]) == (0.75, 0.25)
    assert episodes["episode/status/invalid"] == 0.25
    rows, told = pq.read_table(out).to_pylist(), [json.loads(line) for line in out.with_suffix(".jsonl").open()]
    assert [(one["row"], one["rollout"], one["reward"]) for one in told] == [(r["row"], r["rollout"], r["score"]) for r in rows]
    assert [one["tokens"] for one in told] == [row["response_length"] for row in rows]
    last = told[-1]
    assert (last["turns"], last["turn_rewards"], last["stop"], last["status"]) == (3, [0.25] * 3, "done", "ok")
    assert [message["role"] for message in last["messages"]] == ["user", "assistant"] * 3 + ["user"]
    assert last["messages"][0]["content"] == "3+3"
    assert (told[4]["status"], told[4]["stop"], told[4]["turn_rewards"]) == ("invalid", "error", None)
    assert "ValueError: no idea" in told[4]["error"]
    assert told[0]["messages"][1]["content"] == rows[0]["response"]

    assert evaluate(model, "--recipe", tmp_path / "recipe.py", "--limit", 1) == 0  # greedy, and as the file says
    assert json.loads(capsys.readouterr().out)["score"] == 0.25


def test_sglang_says_what_the_torch_engine_says(sglang_on_cpu, tiny_model, tmp_path, capsys):
    """Greedy and in float32: two implementations of one model."""
    data, reward = tmp_path / "sums.jsonl", tmp_path / "sevens.py"
    row = {"data_source": "sums", "answer": "7"}
    data.write_text("".join(json.dumps(row | {"prompt": f"{i:02d}+{7 * i:02d}="}) + "\n" for i in range(12)))
    reward.write_text("def compute_score(source, text, truth, extra=None): return text.count(truth) / 6\n")
    command = (tiny_model, "--data", data, "--reward", reward, "--answer-key", "answer", "--max-response-length", 6)
    responses = []
    for name, engine in (("torch", ()), ("sglang", ("--deploy", ROOT / "deploy" / "local-sglang.yaml"))):
        assert evaluate(*command, *engine, "--out", tmp_path / f"{name}.parquet") == 0
        responses.append(pq.read_table(tmp_path / f"{name}.parquet").column("response").to_pylist())
    by_torch, by_sglang = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert responses[0] == responses[1]
    assert len(set(responses[0])) > 1
    assert by_torch == by_sglang


@pytest.mark.parametrize("missing", ["--data", "--reward"])
def test_a_model_alone_brings_neither(model, data, reward, missing):
    given = {"--data": data, "--reward": reward}
    given.pop(missing)
    with pytest.raises(ConfigError, match=f"is no run with .*; add {missing}"):
        evaluate(model, *[word for pair in given.items() for word in pair])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--n": 0}, "--n=0 < 1: nothing would be scored"),
        ({"--n": 2}, "--n=2 with --temperature=0: greedy decoding would give 2 equal responses"),
        ({"--k": "2"}, "--k=2 is outside [1, --n=1]: k responses are drawn from n; raise --n"),
        ({"--k": "1;2"}, "--k=1;2: expected numbers with commas between"),
        ({"--top-p": 1.5}, "--top-p=1.5 is outside (0, 1]"),
        ({"--out": "x.json"}, "name a .parquet file"),
        ({"--reward": "{folder}/nothing.py"}, "--reward='{folder}/nothing.py:compute_score': no file"),
        ({"--data": "{folder}/nothing.parquet"}, "no data file"),
        ({"--prompt-key": "question"}, "no column 'question'"),
        (
            {"--max-response-length": 30},
            "--max-response-length=30 > 28: the model knows 32 positions and the longest prompt has 4",
        ),
    ],
)
def test_mistakes_are_named(model, data, reward, tmp_path, change, words):
    options = {"--data": str(data), "--reward": str(reward)} | {k: str(v).format(folder=tmp_path) for k, v in change.items()}
    with pytest.raises((ConfigError, DataError)) as caught:
        evaluate(model, *[word for pair in options.items() for word in pair])
    assert words.format(folder=tmp_path) in str(caught.value)
