"""`hmc report`: one page that loads nothing, whose charts show what the plan holds, and that fits a
laptop's screen in a real browser where one is installed.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from hmc.cli import main
from hmc.compiler import compile as compile_plan
from hmc.errors import UsageError
from hmc.machine.detect import load_machine
from hmc.plan import Decision, Plan, save_plan
from hmc.predict import measured as store
from hmc.predict.cost import CostModel
from hmc.predict.loads import Load, common_loads, predictions
from hmc.predict.measured import Measured
from hmc.report import page as report_page
from hmc.report.heatmap import LEFT, heat_map
from hmc.report.page import render
from hmc.report.roofline import roofline
from hmc.report.timeline import decode_drawing, prefill_drawing
from hmc.report.words import number, si

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """DeepSeek-V3's shapes, eight layers, on a GPU that holds a part of the experts."""
    machine = load_machine("epyc9355-rtx5090")
    gpu = machine.gpus[0].model_copy(update={"memory_bytes": 36 * 10**9})
    machine = machine.model_copy(update={"gpus": (gpu,)})
    path = CONFIGS / "deepseek-v3"
    return compile_plan(path, machine=machine, dummy_weights=True, layers=8, max_context=8192)


@pytest.fixture(scope="module")
def host_plan() -> Plan:
    """Without GPU and rates."""
    machine = load_machine("laptop").model_copy(update={"rates": None})
    path = CONFIGS / "qwen3-30b-a3b"
    return compile_plan(path, machine=machine, dummy_weights=True, layers=3, max_context=1000)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: (exit code, standard output, standard error) of `hmc report`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["report", *map(str, arguments)])
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


_VOID = {"meta", "link", "br", "img", "hr", "input"}


class _Page(HTMLParser):
    """Checks that every tag is closed in order, and keeps tags with attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# -- the page --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["plan", "host_plan"])
def test_the_page_is_whole_and_loads_nothing(which: str, request: pytest.FixtureRequest) -> None:
    html = render(request.getfixturevalue(which), "a.hmp")
    page = _Page(html)
    assert "://" not in html
    assert not re.search(r"@import|url\(|<script|<link|<img|<iframe|src=", html)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [each["href"] or "" for each in page.all("a")]
    assert links and all(link[0] == "#" and link[1:] in ids for link in links)
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") or (svg["role"] == "img" and svg["aria-label"])
    for cell in page.all("th"):
        assert cell["scope"] in ("col", "row")
    assert page.all("html") == [{"lang": "en"}]
    assert "prefers-color-scheme: dark" in html
    for word in ("nan", "None", "inf"):
        assert not re.search(rf"\b{word}\b", html), word


def test_the_page_says_everything(plan: Plan) -> None:
    text = _Page(render(plan, "a.hmp")).text
    assert plan.model.architecture in text
    for decision in plan.decisions:
        assert decision.reason in text
    for item in plan.ledger:
        assert item.kind in text
        assert item.detail in text
    for phase in plan.phases:
        assert phase.name in text
    for key in plan.kernels:
        assert key in text
    for figure in predictions(plan, common_loads([plan])):
        assert figure.rate is not None
        assert figure.load.what in text
        assert number(figure.rate) in text


def test_names_cannot_break_the_page(plan: Plan) -> None:
    decision = Decision(by="x", subject="<b>", choice='"&', reason="</table><script>alert(1)")
    html = render(plan.model_copy(update={"decisions": (decision,)}), "<i>name</i>.hmp")
    _Page(html)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "&lt;i&gt;name" in html


def test_without_rates_it_says_why_there_is_no_time(host_plan: Plan) -> None:
    html = render(host_plan, "a.hmp")
    page = _Page(html)
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert "no-time" in ids
    assert "declares no rates" in page.text
    assert "not known" in page.text
    assert "Decode step" not in page.text
    assert len([svg for svg in page.all("svg") if "role" in svg]) == 2  # heat map and roofline


# -- charts ----------------------------------------------------------------------------------------


def test_every_expert_is_drawn_once(plan: Plan) -> None:
    chart = heat_map(plan)
    assert chart is not None
    drawn: dict[float, list[tuple[float, float, int]]] = {}
    for cell in chart.cells:
        first = (cell.x - LEFT) / chart.column
        drawn.setdefault(cell.y, []).append((first, cell.width / chart.column, cell.colour))
    assert len(drawn) == len(plan.placement)
    for (_, runs), placement in zip(sorted(drawn.items()), plan.placement, strict=True):
        end = 0.0
        for first, width, _ in sorted(runs):
            assert first == pytest.approx(end, abs=1e-6)
            end = first + width
        assert end == pytest.approx(256)
        assert len({colour for _, _, colour in runs}) == len(placement.tiers)
    assert sum(tier.experts for tier in chart.tiers) == 256 * 5
    assert [tier.name for tier in chart.tiers] == ["host", "gpu0"]
    gpu = next(i.bytes for i in plan.ledger if (i.device, i.kind) == ("gpu0", "routed experts"))
    assert chart.tiers[1].bytes == si(gpu, "B")


def _bars(plan: Plan) -> dict[str, list[float]]:
    """Percent of the bar of every device that each kind of the ledger takes."""
    bars = render(plan, "a.hmp").split('<div class="bar" role="img" aria-label="')[1:]
    parts = [bar.partition("</div>")[0] for bar in bars]
    return {
        part.partition(":")[0]: [float(width) for width in re.findall(r"width:([\d.]+)%", part)]
        for part in parts
    }


def test_ledger_bars_add_up(plan: Plan) -> None:
    for name, widths in _bars(plan).items():
        total = sum(item.bytes for item in plan.ledger if item.device == name)
        memory = plan.machine.memory_of(name)
        assert sum(widths) == pytest.approx(100 * total / memory, abs=0.01)
    assert "does not fit" not in render(plan, "a.hmp")
    small = plan.machine.model_copy(update={"memory_bytes": 10**9})
    large = plan.model_copy(update={"machine": small})
    assert sum(_bars(large)["host"]) == pytest.approx(100, abs=0.01)
    html = render(large, "a.hmp")
    assert html.count("does not fit") == 1
    (limit,) = re.findall(r'class="limit" style="left:([\d.]+)%', html)
    assert 0 < float(limit) < 100


def test_timelines_hold_all_steps_in_their_place(plan: Plan) -> None:
    model = CostModel(plan)
    for drawing in (decode_drawing(plan, model, 4096), prefill_drawing(plan, model, 8192)):
        phase = plan.phase(drawing.phase)
        names = {lane.name for lane in drawing.overview.lanes}
        assert names == {step.resource for step in phase.steps}
        for chart in (drawing.overview, drawing.closeup):
            for lane in chart.lanes:
                bars = [bar for bar in chart.bars if bar.y == lane.y]
                for before, after in pairwise(bars):
                    assert before.x <= after.x
                for bar in bars:
                    assert bar.width > 0 and bar.x + bar.width <= chart.width + 1
            assert 2 <= len(chart.marks) <= 10
        layer = drawing.layer
        own = [step for step in phase.steps if step.layer == layer and step.op == "experts"]
        shown = [bar for bar in drawing.closeup.bars if f"experts of layer {layer}" in bar.title]
        assert len(shown) == len(own) > 0
        assert sum(share for _, _, share in drawing.path) <= 1 + 1e-9


def test_a_busy_resource_fills_its_lane(plan: Plan) -> None:
    model = CostModel(plan)
    drawing = decode_drawing(plan, model, 4096)
    scale = drawing.overview.width - 64
    for lane in drawing.overview.lanes:
        bars = [bar for bar in drawing.overview.bars if bar.y == lane.y]
        if lane.busy > 0.2:
            assert sum(bar.width for bar in bars) / scale == pytest.approx(lane.busy, abs=0.1)


def test_prefill_of_a_short_prompt_names_its_chunk(plan: Plan) -> None:
    drawing = prefill_drawing(plan, CostModel(plan), 1000)
    assert drawing.phase == "prefill.host"
    assert "chunk 2 of 2" in drawing.caption


def test_roofline_points_lie_under_their_roof(plan: Plan, host_plan: Plan) -> None:
    chart = roofline(plan, CostModel(plan), 4096, 8192)
    assert chart.timed
    assert [label.split(":")[0] for _, label in chart.roofs] == [
        "CPU",
        "GPU 0, BF16",
        "GPU 0, FP8",
    ]
    # Decode of one token reads each FP8 weight once for two FLOPs.
    experts = [p for p in chart.points if p.name == "experts fp8" and p.decode]
    assert {point.resource for point in experts} == {"cpu", "gpu0"}
    for point in experts:
        assert point.intensity == pytest.approx(2, rel=0.05)
    for point in chart.points:
        assert chart.left <= point.x <= chart.right
        assert chart.top <= point.y <= chart.bottom
    boxes = [(label.x, label.y) for label in chart.labels]
    assert len(boxes) == len(set(boxes)) > 3
    bare = roofline(host_plan, None, 100, 512)
    assert not bare.timed and not bare.roofs
    assert {point.speed for point in bare.points} == {"not known"}


def test_times_are_those_of_the_simulator(plan: Plan) -> None:
    model = CostModel(plan)
    (figure,) = predictions(plan, [Load("decode", 4096)])
    assert figure.seconds is not None
    drawing = decode_drawing(plan, model, 4096)
    assert drawing.seconds == si(figure.seconds, "s")


# -- measurements ----------------------------------------------------------------------------------

ROW = Measured(kind="decode", tokens=128, tokens_per_second=20.0, low=19.0, high=21.0, by="test")


def test_measurements_beside_a_plan(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "a.hmp"
    assert store.read(path, plan) == []
    written = store.record(path, plan, [ROW])
    assert written == tmp_path / "a.measured.json"
    later = ROW.model_copy(update={"tokens_per_second": 25.0, "high": 26.0})
    prompt = ROW.model_copy(update={"kind": "prefill", "tokens": 512})
    store.record(path, plan, [later, prompt])
    rows = store.read(path, plan)
    assert [(row.kind, row.tokens_per_second) for row in rows] == [
        ("decode", 25.0),
        ("prefill", 20.0),
    ]
    assert all(row.date and row.plan_sha256 for row in rows)
    assert store.read(path, plan.model_copy(update={"threads": 99})) == []
    assert [each.name for each in tmp_path.iterdir()] == ["a.measured.json"]


def test_what_is_no_measurement_is_refused(plan: Plan, tmp_path: Path) -> None:
    for content in ("{", "[]", '{"format": "other"}', '{"format": "hmc-measured", "rows": [{}]}'):
        (tmp_path / "a.measured.json").write_text(content)
        with pytest.raises(UsageError, match=r"a\.measured\.json"):
            store.read(tmp_path / "a.hmp", plan)


def test_predicted_stands_beside_measured(plan: Plan) -> None:
    html = render(plan, "a.hmp", [ROW])
    text = _Page(html).text
    assert "20 (19 to 21)" in text
    (figure,) = predictions(plan, [ROW.load])
    assert figure.rate is not None
    assert f"{100 * (figure.rate / 20 - 1):+.1f} %" in text
    assert "no-measurement" not in html
    assert "no-measurement" in render(plan, "a.hmp")


# -- the command -----------------------------------------------------------------------------------


def test_command(plan: Plan, tmp_path: Path, run: Run) -> None:
    path, page = tmp_path / "a.hmp", tmp_path / "a.html"
    save_plan(plan, path)
    bench = tmp_path / "bench.json"
    row = {"test": "tg64@128", "tokens_per_second": 20.5, "min": 20.0, "max": 21.0}
    bench.write_text(json.dumps({"rows": [row], "machine": "here", "command": "hmc bench a.hmp"}))
    code, out, err = run(path, "-o", page, "--measured", bench)
    assert (code, err) == (0, "")
    assert "1 measured figures" in out
    assert "decode at context 160" in page.read_text()
    assert "hmc bench a.hmp" in page.read_text()
    store.record(path, plan, [ROW])
    code, out, _ = run(path, "-o", page, "--json")
    assert json.loads(out) == {
        "report": str(page),
        "bytes": page.stat().st_size,
        "measured": 1,
    }


def test_command_refuses(plan: Plan, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "a.hmp"
    save_plan(plan, path)
    bad = tmp_path / "bad.json"
    bad.write_text('{"rows": [{"test": "??"}]}')
    cases: list[tuple[tuple[object, ...], int]] = [
        ((tmp_path / "none.hmp", "-o", tmp_path / "a.html"), 5),
        ((path, "-o", tmp_path / "no" / "a.html"), 5),
        ((path, "-o", tmp_path / "a.html", "--measured", bad), 2),
        ((path, "-o", tmp_path / "a.html", "--measured", tmp_path / "none.json"), 2),
    ]
    for arguments, expected in cases:
        code, out, err = run(*arguments)
        assert (code, out) == (expected, "")
        assert err.startswith("hmc: error: ") and err.count("\n") == 1


def test_words() -> None:
    assert si(0, "B") == "0 B"
    assert si(999, "B") == "999 B"
    assert si(1500, "B") == "1.5 kB"
    assert si(654_100_000_000, "B") == "654 GB"
    assert si(0.0461, "s") == "46.1 ms"
    assert si(3.2e-6, "s") == "3.2 µs"
    assert si(27.4, "s") == "27.4 s"
    assert si(2.93e14, "FLOP/s") == "293 TFLOP/s"
    assert number(21.53) == "21.5"
    assert number(1100.4) == "1 100"
    assert number(0.1234) == "0.123"


def test_a_colour_means_one_thing(plan: Plan) -> None:
    """Families of ops, tiers, other kinds of memory, and predicted or measured: in both schemes no
    two share a colour, and memory that is for one family has the family's.
    """
    style = (Path(report_page.__file__).parent / "templates" / "style.css").read_text()
    schemes = [part for part in style.split(":root")[1:] if "--f0" in part]
    assert len(schemes) == 2
    for scheme in schemes:
        colours = re.findall(r"--[ftkp]\d: (#\w+);", scheme)
        assert len(colours) == len(set(colours)) > 18
    html = render(plan, "a.hmp")
    families = [
        re.sub("<.*?>", "", row) for row in re.findall(r'<li><i class="f\d">.*?</li>', html)
    ]
    shown = set(re.findall(r'class="swatch (\w+)"></span>([\w ]+)', html))
    kinds = {kind: style for style, kind in shown}
    assert kinds["routed experts"] == f"f{families.index('experts')}"
    assert kinds["attention"] == f"f{families.index('attention')}"
    others = [style for kind, style in kinds.items() if style[0] == "k"]
    assert kinds["KV cache"] in others and len(others) == len(set(others))
    assert len(shown) == len(kinds)  # a kind has one colour


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium here: the page's layout and screenshot are not checked")
    return found


def _chromium(browser: str, folder: Path, *arguments: str) -> str:
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


_MEASURE = """<script>
const root = document.documentElement, wide = [];
for (const each of document.querySelectorAll("main *")) {
  const box = each.getBoundingClientRect();
  if (box.width && (box.right > root.clientWidth + 1 || box.left < -1)) wide.push(each.tagName);
}
const tall = [...document.querySelectorAll("svg[role=img]")].map(
  each => Math.round(each.getBoundingClientRect().height));
document.title = JSON.stringify({scroll: root.scrollWidth, client: root.clientWidth, wide, tall});
</script></body>"""


@pytest.mark.parametrize("width", [1280, 1440])
def test_it_fits_a_laptop(browser: str, plan: Plan, tmp_path: Path, width: int) -> None:
    page = tmp_path / "a.html"
    html = render(plan, "a.hmp", [ROW]).replace("<details>", "<details open>")
    page.write_text(html.replace("</body>", _MEASURE))
    arguments = (f"--window-size={width},900", "--dump-dom", page.as_uri())
    dom = _chromium(browser, tmp_path, *arguments)
    found = json.loads(re.findall("<title>(.*?)</title>", dom)[0])
    assert found["client"] == width
    assert found["scroll"] <= width
    assert found["wide"] == []
    assert len(found["tall"]) == 6
    assert all(height > 80 for height in found["tall"])


def test_a_phone_scrolls_no_way_but_down(browser: str, plan: Plan, tmp_path: Path) -> None:
    """Headless windows are 500 wide at least, so the page is framed; tables and charts scroll
    within themselves."""
    page, frame = tmp_path / "a.html", tmp_path / "frame.html"
    page.write_text(render(plan, "a.hmp", [ROW]).replace("<details>", "<details open>"))
    frame.write_text(
        f'<title></title><iframe src="{page.as_uri()}" width="390" height="844"></iframe>'
        "<script>onload = () => { const root = frames[0].document.documentElement;"
        " document.title = root.scrollWidth + ' of ' + root.clientWidth; }</script>"
    )
    arguments = ("--allow-file-access-from-files", "--dump-dom", frame.as_uri())
    dom = _chromium(browser, tmp_path, *arguments)
    scroll, client = re.findall(r"<title>(\d+) of (\d+)</title>", dom)[0]
    assert int(scroll) <= int(client) <= 390


def test_screenshot(browser: str, plan: Plan, tmp_path: Path) -> None:
    page, shot = tmp_path / "a.html", tmp_path / "a.png"
    page.write_text(render(plan, "a.hmp"))
    _chromium(browser, tmp_path, "--window-size=1360,2400", f"--screenshot={shot}", page.as_uri())
    data = shot.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1360, 2400)
    assert len(data) > 60_000  # a blank page compresses to far less
