"""The dashboard asks for nothing that no run exports."""

import json
import re
from pathlib import Path

from asyncrl.report.names import prometheus_name, table

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "asyncrl.json"


def exported() -> dict[str, set[str]]:
    """Names in Prometheus, with their labels."""
    free = {"lag": "1", "k": "4", "turn": "1", "generator": "generator-0", "reward": "reward-0", "model": "model-0.0"}
    free |= {"actor": "learner", "state": "busy"}
    found = {"ray_asyncrl_update": {"run"}}
    for row in table():
        for name in row.each():
            metric = re.sub(r"<(\w+)>", lambda what: free.get(what[1], what[1]), name)
            metric = f"actors/{metric.removesuffix('_s')}" if "<state>" in name else metric
            for at in ("", "actors/") if row.kind == "actors" else ("", "eval/"):
                known, labels = prometheus_name(metric if metric.startswith(at) else at + metric)
                found[f"ray_{known}"] = {"run", *labels}
    return found


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_every_query_is_of_an_exported_metric_and_its_labels() -> None:
    known, asked = exported(), queries()
    assert len(asked) > 50
    for expression in asked:
        [(name, labels)] = re.findall(r"(ray_\w+)\{([^}]*)\}", expression)
        assert name in known, expression
        assert set(re.findall(r"(\w+)=", labels)) <= known[name], expression


def test_legends_and_variables_are_labels_and_panels_are_apart() -> None:
    board, known = json.loads(DASHBOARD.read_text()), exported()
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            name = re.findall(r"ray_\w+", target["expr"])[0]
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known[name], target
    assert any(variable.get("query", {}) == {"query": "label_values(ray_asyncrl_update, run)", "refId": "run"}
               for variable in board["templating"]["list"] if isinstance(variable["query"], dict))  # fmt: skip
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(places) == len(board["panels"])
