"""The report as text, JSON with its schema, and a page: from real models, and hostile ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import moe_fx
from moe_fx.cli.tiny import tiny_model
from moe_fx.plan import Predicted, Span
from moe_fx.region import Declined, Region
from moe_fx.report import Report
from tests.testing.layers import Layer, LowestScores, arguments, tokens, two_layers


@pytest.fixture(scope="module")
def found() -> Report:
    """Two unlike layers' worth: a real model for four ranks, and a candidate that was declined."""
    model = tiny_model("deepseek_v3")
    report = moe_fx.explain(model, torch.arange(12)[None], use_cache=False, ranks=4)
    report.extend(moe_fx.explain(LowestScores(), tokens(12, 32)))
    return report


@pytest.fixture(scope="module")
def page(found: Report) -> str:
    return found.to_html()


# -- what was verified -----------------------------------------------------------------------------


def test_a_region_says_how_it_was_verified(found: Report) -> None:
    for region in found.regions:
        assert region.verified
        seen = region.verification
        assert seen is not None
        assert seen.routings == (
            "random routing",
            "only the last experts",
            "only the first experts",
        )
        assert seen.ranks == 4
        assert 0 < seen.max_difference < seen.tolerance == 1e-4


def test_without_verification_there_is_nothing_to_say() -> None:
    report = moe_fx.explain(Layer(), tokens(12, 32), options={"verify": "off"})
    (region,) = report.regions
    assert (region.verified, region.verification) == (False, None)
    assert json.loads(report.to_json())["regions"][0]["verification"] is None
    assert re.search(r"verified</th><td>\s*no\s*</td>", report.to_html())


def test_the_table_and_the_text_show_it(found: Report) -> None:
    assert "4 ranks" in str(found)
    text = found.to_text()
    assert text.startswith("MoE layers found: 2, declined: 1")
    assert re.search(r"verified: 4 ranks, within \de-\d\d", text)
    assert found.declined[0].source in text


# -- JSON ------------------------------------------------------------------------------------------


def test_json_is_as_the_schema_says(found: Report) -> None:
    schema = Report.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for report in (found, Report()):
        jsonschema.validate(json.loads(report.to_json()), schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("regions", 0, "num_experts"), "many"),
        (("regions", 0, "verification", "routings"), None),
        (("declined", 0, "reason"), None),
    ],
)
def test_the_schema_rejects_what_is_otherwise(
    found: Report, path: tuple[Any, ...], value: Any
) -> None:
    data = json.loads(found.to_json())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, Report.json_schema())


def test_the_schema_knows_every_field_and_requires_it(found: Report) -> None:
    data, schema = json.loads(found.to_json()), Report.json_schema()
    of = schema["$defs"]
    pairs = [
        (data, schema),
        (data["regions"][0], of["Region"]),
        (data["regions"][0]["router"], of["Router"]),
        (data["regions"][0]["verification"], of["Verification"]),
        (data["declined"][0], of["Declined"]),
        (data["plans"][0], of["ExchangePlan"]),
    ]
    for value, described in pairs:
        assert set(value) == set(described["properties"]) == set(described["required"])
        assert described["description"]


def test_every_field_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    schema = Report.json_schema()
    for described in (schema, *schema["$defs"].values()):
        for name in described["properties"]:
            assert re.search(rf"`\.?{name}(\[\])?`", page), name


# -- the page --------------------------------------------------------------------------------------

_VOID = {"meta", "br", "link", "img"}


class Tags(HTMLParser):
    """Raises where tags do not nest; collects the attributes that load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        self.loads += [v for n, v in attrs if n in ("src", "href") and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.loads == []
    assert not re.search(r"<script|@import|url\(|https?:", page)


def marked_lines(page: str) -> list[str]:
    plain = [re.sub(r"<[^>]+>", "", text) for text in re.findall(r'line hit">(.*?)\n', page)]
    return [text.replace("&#39;", "'").replace("&quot;", '"') for text in plain]


def test_the_selection_is_shown_with_lines_around_it(found: Report, page: str) -> None:
    line = found.regions[0].source.rpartition(":")[2]
    selection = page[page.index("The selection of experts") :]
    assert marked_lines(selection)[0].startswith(f"{line}  ")
    assert "topk_indices = torch.topk(scores_for_choice" in marked_lines(selection)[0]
    assert f"<i>{int(line) - 4}</i>" in selection
    assert f"<i>{int(line) + 4}</i>" in selection


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("router", "scores = router_logits.sigmoid()"),
        ("dispatch", "torch.sort(expert_ids)"),
        ("experts", "gate_up_out.chunk(2, dim=-1)"),
        ("combine", "sample_weights_g.unsqueeze(-1)"),
    ],
)
def test_each_part_shows_the_lines_that_made_it(page: str, part: str, line: str) -> None:
    section = page.split(f'<section class="{part}">')[1].split("</section>")[0]
    assert any(line in marked for marked in marked_lines(section))


def test_the_graph_is_shown_before_and_after(found: Report, page: str) -> None:
    before, after = page.split("<h4>before</h4>")[1].split("<h4>after</h4>")
    assert "<em>aten.sort</em>(view_16)" in before
    assert "moe_fx." not in before
    listing = found.regions[0].listing
    assert listing is not None
    for step in listing.after:
        assert f"<b>{step.name}</b> = <em>{step.op}</em>" in after
    assert "moe_fx.all_to_all" in after


def test_every_node_of_a_region_is_in_one_part(found: Report) -> None:
    for region in found.regions:
        assert region.listing is not None
        names = [step.name for step in region.listing.before]
        assert len(names) == len(set(names))
        assert {node.name for node in region.parts.nodes} <= set(names)
        assert {step.part for step in region.listing.before} == {
            *("router", "dispatch", "experts", "combine")
        }


def test_what_was_verified_and_planned_is_on_the_page(page: str) -> None:
    text = " ".join(re.sub(r"<[^>]+>", "", page).split())
    assert "by value: random routing; only the last experts; only the first experts" in text
    assert re.search(r"on 4 ranks; largest relative difference \d\.\de-\d\d", text)
    assert (
        "alltoall, 4 ranks of 4 experts; not capture-safe: moe_fx::split_sizes waits for the device"
        in text
    )


def test_layers_that_are_alike_are_shown_once(page: str) -> None:
    assert "MoE layers 1, 2" in page
    assert page.count("<article") == 2  # and the one declined


def test_every_row_links_to_its_details(page: str) -> None:
    targets = re.findall(r'href="#([^"]+)"', page)
    assert targets == ["layer-1", "declined-1"]
    for target in targets:
        assert page.count(f'<article id="{target}">') == 1


def test_a_declined_candidate_is_shown_with_its_source(page: str) -> None:
    declined = page[page.index("<h2>Declined</h2>") :]
    assert "the selection takes the lowest scores" in declined
    assert ["topk(2, largest=False)" in line for line in marked_lines(declined)] == [True]


def test_a_report_of_a_compiled_model_has_the_graphs_too() -> None:
    report = Report()
    options = {"base": "eager", "on_report": report.extend}
    torch.compile(two_layers, backend="moe_fx", options=options)(*arguments(12, 32))
    assert report.to_html().count("moe_fx.grouped_mm") >= 2
    assert all(region.listing is not None for region in report.regions)


def test_the_page_draws_the_predicted_timeline() -> None:
    report = moe_fx.explain(Layer(), tokens(12, 32), ranks=2)
    assert "<svg" not in report.to_html()
    whole = (Span("wait", 0, 1), Span("exchange", 0, 1), Span("compute", 1, 3))
    halves = (Span("wait", 0, 0.5), Span("exchange", 0, 1), Span("compute", 0.5, 2.5))
    predicted = Predicted(2.5, 2, 1, 3, halves, whole)
    report.plans = [replace(report.plans[0], predicted=predicted)]
    page = report.to_html()
    widths = re.findall(r'<rect class="compute"[^>]*width="([\d.]+)"', page)
    assert widths == ["440.00", "440.00"]  # two of three seconds
    assert "3e+03 ms" in page and "2.5e+03 ms" in page
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    jsonschema.validate(json.loads(report.to_json()), Report.json_schema())


HOSTILE = "<script>alert('&')</script>"


def test_everything_is_escaped(tmp_path: Path) -> None:
    file = tmp_path / "<b>model.py"
    file.write_text(f"x = 1\ny = {HOSTILE!r}  # </pre></figure>\n")
    (region,) = moe_fx.explain(Layer(), tokens(12, 32)).regions
    region = replace(region, source=f"{file}:2", activation=HOSTILE, input=HOSTILE, form=HOSTILE)
    page = Report(
        regions=[region], declined=[Declined(HOSTILE, HOSTILE, f"{file}:2", HOSTILE)]
    ).to_html()
    assert "<script" not in page
    assert "<b>model" not in page
    assert page.count("</pre>") == page.count("<pre")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []


def strip_listing(region: Region) -> Region:
    return replace(region, listing=None, verification=None, source="")


def unknown_file(region: Region) -> Region:
    return replace(region, source="/no/such/file.py:3")


def line_after_the_end(region: Region) -> Region:
    return replace(region, source=f"{__file__}:1000000")


@pytest.mark.parametrize("change", [strip_listing, unknown_file, line_after_the_end])
def test_what_is_missing_is_left_out(change: Callable[[Region], Region]) -> None:
    (region,) = moe_fx.explain(Layer(), tokens(12, 32)).regions
    page = Report(regions=[change(region)], declined=[Declined("why", "node", "")]).to_html()
    assert "MoE layers found: 1" in page
    assert ("cannot be read here" in page) == (change is not strip_listing)
    assert "the graph does not say from which source line" in page


def test_an_empty_report_is_a_page_too() -> None:
    assert "no graph selects experts" in Report(graphs=1).to_html()


def test_files_are_written(found: Report, page: str, tmp_path: Path) -> None:
    found.to_html(tmp_path / "r.html")
    found.to_json(tmp_path / "r.json")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == page
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(found.to_json())
