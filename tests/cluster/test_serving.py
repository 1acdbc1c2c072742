"""The models of rewards as an actor has them: loaded, asked, and written down."""

import json
import shutil

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.cluster.serving import note, serve_model
from asyncrl.config import EngineSpec, JudgeSpec, LimitsSpec, ModelSpec, ModelsSpec, RewardTerm

SPEC = ModelsSpec(engine=EngineSpec(max_length=32, slots=4))


def test_a_judge_of_the_runs_own_writes_what_its_model_writes(tiny_model, tmp_path, caplog):
    prompt, folder = tmp_path / "ask.txt", tmp_path / "model"
    prompt.write_text("{response}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12+34="}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": written[-1]}))
    expected = written[: written.index(written[-1]) + 1]
    term = RewardTerm(judge=JudgeSpec(prompt=str(prompt), model=ModelSpec(path=str(folder)), max_tokens=6), name="judge/own")
    served = serve_model("model-0.0", term, SPEC, LimitsSpec(), tmp_path, 60.0)
    try:
        answer = served.respond("12+34=")
        served.health()
        assert served.respond("1" * 40).status == "invalid"  # longer than the engine takes
    finally:
        served.close()
    assert (answer.status, answer.texts) == ("ok", [tokenizer.decode(expected, skip_special_tokens=True)])

    note(tmp_path / "rewards", term, served.facts)
    said = json.loads((tmp_path / "rewards" / "judge-own.json").read_text())
    assert said["model"] == str(folder)
    assert {len(said[digest]) for digest in ("weights", "chat_template", "prompt")} == {64}
    note(tmp_path / "rewards", term, served.facts)
    assert caplog.text == ""
    prompt.write_text("{response}!")
    note(tmp_path / "rewards", term, served.facts)
    assert "reward judge/own is not what this run began with" in caplog.text
