"""Rules and dashboard ask for metrics that exist, in PromQL."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import promql_parser
import pytest
import yaml

import dam_vllm

DEPLOY = Path(dam_vllm.__file__).parents[1] / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/dam-vllm.json"
SUFFIXES = {
    "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",),
}  # fmt: skip
# What Grafana puts in for its variables.
VARIABLES = {"$__rate_interval": "5m", "$model": "a|b"}


def defined(folder):
    """Series that the code of a folder gives Prometheus, by the calls that define metrics."""
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                given = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "name")]
                names = [
                    each.value for each in given
                    if isinstance(each, ast.Constant) and str(each.value).startswith("vllm:")
                ]  # fmt: skip
                kind = re.search("counter|histogram|gauge", ast.unparse(node.func).lower())
                if names and kind:
                    found |= {names[0] + suffix for suffix in SUFFIXES[kind[0]]}
    return found


def rules():
    groups = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels():
    return json.loads(DASHBOARD.read_text())["panels"]


def expressions():
    """Every expression by where it stands."""
    found = {rule.get("record") or rule["alert"]: rule["expr"] for rule in rules()}
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            found[f"{panel['title']} {target['refId']}"] = expression
    return found


def asked(expression):
    """Series that an expression selects."""
    names = re.findall(r'"[^"]*"|([a-zA-Z_:][\w:]*)\s*(?=[\{\[])', expression)
    return {name for name in names if name}


@pytest.mark.parametrize("place", expressions())
def test_expressions_are_promql(place):
    assert promql_parser.parse(expressions()[place])


def test_wrong_expressions_are_found():
    with pytest.raises(ValueError, match=r"unclosed|invalid|unexpected"):
        promql_parser.parse("sum(rate(x[5m])")


def test_only_metrics_that_exist_are_asked_for():
    vllm = Path(importlib.util.find_spec("vllm").origin).parent
    known = defined(Path(dam_vllm.__file__).parent) | defined(vllm / "v1/metrics")
    known |= {rule["record"] for rule in rules() if "record" in rule}
    everything = set().union(*map(asked, expressions().values()))
    assert "vllm:dam_pages_read_total" in everything
    assert everything - known == set()
    variable = json.loads(DASHBOARD.read_text())["templating"]["list"][1]["query"]
    assert re.search(r"\((\S+),", variable)[1] in known


def test_definitions_are_read_from_code(tmp_path):
    (tmp_path / "a.py").write_text(
        'Counter("vllm:a", "x")\nself._gauge_cls(name="vllm:b")\nHistogramMetricFamily("vllm:c")\n'
        'print("vllm:d")\n'
    )
    expected = {"vllm:a_total", "vllm:b", "vllm:c_bucket", "vllm:c_sum", "vllm:c_count"}
    assert defined(tmp_path) == expected
    assert asked('rate(vllm:a_total{x="y:z{"}[5m]) > on (b) dam:r{k="v"}') == {
        "vllm:a_total", "dam:r"
    }  # fmt: skip


def test_prometheus_and_grafana_find_each_other():
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert [(DEPLOY / "prometheus" / file).is_file() for file in scraped["rule_files"]] == [True]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    (target,) = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in services
    folder = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    assert re.match(r"http://(\w+):9090$", source["url"])[1] in services
    (provider,) = yaml.safe_load((folder / "dashboards/dashboards.yml").read_text())["providers"]
    mounts = [volume.split(":")[:2] for volume in services["grafana"]["volumes"]]
    assert ["./grafana/dashboards", provider["options"]["path"]] in mounts


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in panels()]
    cells = {
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    }
    assert len(cells) == sum(place["w"] * place["h"] for place in places)
    assert len({panel["id"] for panel in panels()}) == len(panels())
