"""The page in a real browser: it opens from disk, says nothing on the console, and is used by keyboard.

Needs chromium and its driver (Debian's `chromium` and `chromium-driver`); skipped without them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpasses
from fxpasses.cli.model_specs import load_model
from fxpasses.report.data import Remark
from fxpasses.report.drawing import Copy, DrawnNode, GraphDrawing
from fxpasses.report.layout_plan import ConvolutionPlan, CutEdge, LayoutPlan
from fxpasses.report.report import Report

MEGABYTE = 1_000_000
HOSTILE = "</script><img src=x onerror=alert(1)>{{7*7}}"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver on the path"
)


class Page:
    """A page that is open in a browser."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def run(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).click()", selector)

    def texts(self, selector: str) -> list[str]:
        script = """return Array.from(document.querySelectorAll(arguments[0]))
            .filter(each => each.checkVisibility()).map(each => each.textContent)"""
        return list(self.run(script, selector))

    @property
    def chosen(self) -> str:
        """The name of the chosen row."""
        return str(self.run("return document.querySelector('[aria-selected=true] .name').textContent"))

    @property
    def focused(self) -> str:
        return str(self.run("return document.activeElement.id"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,1000"):
        options.add_argument(f"--{argument}")
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[[Report], Page]]:
    def open_page(report: Report) -> Page:
        report.save_html(tmp_path / "report.html")
        browser.get((tmp_path / "report.html").as_uri())
        page = Page(browser)
        ready = page.run("return document.documentElement.dataset.ready")
        while ready is None:
            ready = page.run("return document.documentElement.dataset.ready")
        print(f"interactive {ready} ms after it was asked for")
        return page

    yield open_page
    assert browser.get_log("browser") == []


def node(name: str, *inputs: int, module: str = "", kind: str = "call_function", **more: str) -> DrawnNode:
    return DrawnNode(name, kind, name.rstrip("_0123456789"), inputs, "float32[2]", module, **more)


def small() -> Report:
    """Two convolutions and a pool, planned: the second reads a copy; a site is applied, another declined."""
    nodes = (
        node("image", kind="placeholder", label="contiguous"),
        node("weight", kind="placeholder"),
        node("conv_1", 0, 1, module="block.0", label="contiguous", status="applied"),
        node("relu_1", 2, module="block.0", label="contiguous"),
        node("conv_2", 3, 1, module="block.1", label="channels_last", status="declined"),
        node("relu_2", 4, module="block.1", label="channels_last"),
        node("mean", 5),
        node("output", 6, kind="output"),
    )
    remarks = (
        Remark("some_rule", "applied", "applied", "replaced it", "conv_1", stage="applied", module="block.0"),
        Remark("some_rule", "declined", "mutation", "written to", "conv_2", stage="hazards"),
        Remark("other_rule", "declined", "dtype", "is complex", "mean", stage="check"),
    )
    edge = CutEdge("relu_1", "relu", (2, 3, 8, 8), "contiguous", 2e-6, ("conv_2",), ("add",), node="relu_1")
    plan = LayoutPlan(
        labels={"relu_1": "contiguous"},
        convolutions=(ConvolutionPlan("conv_2", "channels_last", "onednn", 5e-6, 3e-6),),
        cut_edges=(edge,),
        seconds=5e-6,
        contiguous_seconds=6e-6,
        channels_last_seconds=7e-6,
        converted=1,
    )
    before = GraphDrawing("before", "torch", nodes)
    planned = GraphDrawing("planned", "torch", nodes, (Copy(3, (4,), 2e-6),))
    return Report(remarks, {"some_rule": 0.1}, 8, 8, "torch", plan, graphs=(before, planned))


def chain(count: int) -> Report:
    """A chain of blocks, every fourth value read again far away."""
    nodes = [node("x", kind="placeholder")]
    for position in range(1, count):
        far = (position - 150,) if position % 4 == 0 and position > 150 else ()
        nodes.append(
            node(f"n_{position}", position - 1, *far, module=f"stage{position // 500}.{position // 10}")
        )
    return Report(
        nodes_before=count, nodes_after=count, graphs=(GraphDrawing("before", "torch", tuple(nodes)),)
    )


@pytest.fixture(scope="module")
def resnet50() -> Report:
    torch.manual_seed(0)
    return fxpasses.explain(load_model("timm:resnet50").eval(), torch.randn(2, 3, 64, 64))


@pytest.mark.full
def test_resnet50_s_training_report_is_below_two_megabytes(resnet50: Report, tmp_path: Path) -> None:
    resnet50.save_html(tmp_path / "report.html")
    assert resnet50.applied == {"efficient_conv_bn_eval": 53}
    assert (tmp_path / "report.html").stat().st_size < 2 * MEGABYTE


@pytest.mark.full
@needs_browser
def test_resnet50_s_page_opens_from_disk_and_loads_nothing(resnet50: Report, opened: Any) -> None:
    page = opened(resnet50)
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert page.texts("#stages span") == ["Before", "After", "Planned layouts"]
    assert "layer1" in page.texts("#tree .name")
    page.click("#next")
    assert page.texts("#details dt").count("efficient_conv_bn_eval") == 1


@needs_browser
@pytest.mark.parametrize("count", [2000, 10_000])
def test_a_large_graph_opens_folded_and_unfolds(opened: Any, count: int) -> None:
    page = opened(chain(count))
    assert 4 <= len(page.texts("#tree .row")) <= 80
    page.click("#open")
    assert page.run("return document.querySelectorAll('#tree .row').length") > count
    page.run("document.getElementById('find').focus()")
    page.press(f"n_{count - 1}")
    assert page.chosen == f"n_{count - 1}"
    assert page.texts("#found") == ["1 of 1"]


@needs_browser
def test_filters_leave_the_rows_that_fit(opened: Any) -> None:
    page = opened(small())
    rules = "#remarks tbody tr td:first-child"
    choose = """const select = document.querySelector(arguments[0]); select.value = arguments[1];
        select.dispatchEvent(new Event('input', {bubbles: true}))"""
    assert len(page.texts(rules)) == 3
    page.run(choose, "[name=status]", "declined")
    assert page.texts(rules) == ["some_rule", "other_rule"]
    page.run(choose, "[name=rule]", "other_rule")
    assert page.texts(rules) == ["other_rule"]
    page.run("document.querySelector('#filters [type=reset]').focus()")
    page.press(" ")
    page.run("document.querySelector('[name=text]').focus()")
    page.press("written")
    assert page.texts(rules) == ["some_rule"]
    assert page.texts("#shown") == ["1 of 3 sites"]


@needs_browser
def test_the_graph_is_used_by_keyboard(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page = opened(small())
    page.run("document.getElementById('close').focus()")
    page.press(Keys.TAB)
    assert page.focused == "tree"
    page.press(Keys.HOME)
    assert page.chosen == "inputs and parameters"
    assert "image" not in page.texts("#tree .name")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert page.chosen == "image"
    page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert "image" not in page.texts("#tree .name")
    page.press("n")
    assert page.chosen == "conv_1"
    page.press("n")
    assert page.chosen == "conv_2"
    assert "declined [mutation]" in page.texts("#details dd")
    page.press("p")
    assert page.chosen == "conv_1"
    page.press(Keys.END)
    assert page.chosen == "output"
    page.press("/", "RELU_2")
    assert (page.focused, page.chosen) == ("find", "relu_2")
    page.press(Keys.ESCAPE)
    assert page.focused == "tree"


@needs_browser
def test_stages_are_chosen_by_arrow_keys_and_keep_the_node(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page = opened(small())
    page.click("#next")
    assert page.run("return document.querySelectorAll('svg .cut').length") == 0
    page.run("document.querySelector('#stages input').focus()")
    page.press(Keys.ARROW_RIGHT)
    assert page.chosen == "conv_1"
    assert page.run("return document.querySelectorAll('svg .cut').length") == 1
    assert "copied 2.0 µs" in page.texts("#tree .chip")


@needs_browser
def test_a_node_s_details_have_its_layout_costs_and_neighbours(opened: Any) -> None:
    page = opened(small())
    page.click("#stages label:last-of-type input")
    page.click("#next")
    page.click("#next")
    page.click("#next")
    found = page.texts("#details dd")
    assert page.chosen == "conv_2"
    assert {"channels_last", "block.1", "contiguous 5.0 µs", "channels_last 3.0 µs", "by onednn"} <= set(
        found
    )
    assert page.texts("#details button") == ["relu_1", "weight", "relu_2"]
    page.click("#details button")
    assert page.chosen == "relu_1"
    assert "for conv_2 in 2.0 µs" in page.texts("#details dd")


@needs_browser
def test_a_site_in_the_table_leads_to_its_node(opened: Any) -> None:
    page = opened(small())
    page.click("#remarks tbody tr:nth-child(2) button")
    assert (page.chosen, page.focused) == ("conv_2", "tree")


@needs_browser
def test_parts_of_a_merged_report_are_chosen_apart(opened: Any) -> None:
    nested = replace(small().graphs[0], graph="wrap_body_0")
    page = opened(Report.merge([small(), replace(small(), graphs=(small().graphs[0], nested))]))
    names = page.run(
        "return Array.from(document.querySelectorAll('#which option'), each => each.textContent)"
    )
    assert names == ["the whole graph", "graph 2", "wrap_body_0"]
    page.run("""const which = document.getElementById('which'); which.selectedIndex = 2;
        which.dispatchEvent(new Event('change'))""")
    assert page.texts("#stages span") == ["Before"]


@needs_browser
def test_hostile_names_are_text(opened: Any) -> None:
    hostile = [node._replace(name=HOSTILE, module=HOSTILE, value=HOSTILE) for node in small().graphs[0].nodes]
    remarks = tuple(replace(remark, node=HOSTILE, message=HOSTILE) for remark in small().remarks)
    picture = GraphDrawing("before", HOSTILE, tuple(hostile), graph=HOSTILE)
    page = opened(Report(remarks, graphs=(picture,)))
    page.click("#open")
    page.click("#next")
    assert HOSTILE in page.texts("#tree .name")
    assert page.texts("#details h3") == [HOSTILE]
    assert page.run("return document.images.length") == 0


CONTRASTS = """
const parts = color => color.match(/[\\d.]+/g).map(Number);
const luminance = color => parts(color).slice(0, 3).map(each => each / 255)
  .map(each => each <= .04045 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4)
  .reduce((sum, each, index) => sum + each * [.2126, .7152, .0722][index], 0);
const ground = element => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (parts(color)[3] !== 0) return color;
  }
};
return Array.from(document.querySelectorAll("body *"))
  .filter(each => each.checkVisibility() && Array.from(each.childNodes).some(child => child.nodeType === 3 && child.data.trim()))
  .map(each => {
    const [a, b] = [luminance(getComputedStyle(each).color), luminance(ground(each))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), `${each.tagName} ${each.className} ${each.textContent}`];
  });
"""  # noqa: E501


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(opened: Any, scheme: str) -> None:
    page = opened(small())
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.click("#next")
    ground = page.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    found = page.run(CONTRASTS)
    assert len(found) > 30
    # WCAG 2, level AA, for text of normal size.
    assert [ratio for ratio in found if ratio[0] < 4.5] == []
