"""The report, as a browser shows it."""

import dataclasses
import itertools
import json

import pytest
from browser import chromium, set_screen
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sirius import SiriusConfig, make_sparse, reasoner_path, reasoner_problems, trace
from hf_sirius.cli.main import main
from hf_sirius.decode.stats import GenerationStats
from hf_sirius.study.problems import problem_prompt
from hf_sirius.study.report import report, write_report
from hf_sirius.study.tracing import FATES, Trace, TracedToken


PROMPT = problem_prompt(reasoner_problems()[0]["question"])
HOSTILE = "</script></style></div><script>document.title = 'owned'</script>"
HOSTILE += "<img src=x onerror=\"document.title='owned'\">'&amp;"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def traced() -> Trace:
    tokenizer = AutoTokenizer.from_pretrained(reasoner_path())
    model = AutoModelForCausalLM.from_pretrained(reasoner_path()).eval()
    with make_sparse(model, method="griffin", density=0.3, tree_width=4) as sparse:
        return trace(sparse, tokenizer, PROMPT, max_new_tokens=200, do_sample=False)


@pytest.fixture
def show(page, tmp_path):
    def show(shown: Trace, width: int = 1280, scheme: str = "light"):
        set_screen(page, width, scheme=scheme)
        write_report(shown, tmp_path / "report.html")
        page.get((tmp_path / "report.html").as_uri())
        return page

    return show


def make_trace(tokens=(), prompt="", **fields) -> Trace:
    stats, config = GenerationStats(16), SiriusConfig(kernel_size=16).to_dict()
    return Trace(**{"model_name": "m", "measures": stats.as_dict(), "config": config, **fields}, prompt=prompt,
                 tokens=tuple(tokens))  # fmt: skip


def styles(page, selector: str) -> list[dict]:
    """The computed styles of all elements that a selector finds."""
    return page.execute_script(
        """return [...document.querySelectorAll(arguments[0])].map(element => {
             const style = getComputedStyle(element);
             return {line: style.textDecorationLine, color: style.color, background: style.backgroundColor,
                     visible: element.checkVisibility() && element.getClientRects().length > 0};
           })""",
        selector,
    )


def in_page(traced: Trace) -> list[TracedToken]:
    """The tokens in the order of the page, where branches stand below their cycle's line."""
    return sorted(traced.tokens, key=lambda token: (token.cycle, token.fate == "branch"))


def tip(page) -> str:
    """The visible text of the tip, or "" while there is none."""
    return page.find_element(By.ID, "tip").text


def test_each_token_is_seen_in_the_style_of_what_became_of_it(show, traced):
    page = show(traced)
    looks = {}
    for fate in FATES:
        shown = styles(page, f".token.{fate}")
        assert len(shown) == sum(token.fate == fate for token in traced.tokens) > 0
        assert all(style["visible"] for style in shown)
        assert len({json.dumps(style) for style in shown}) == 1
        looks[fate] = shown[0]
        assert styles(page, f".legend .{fate}") == [shown[0]]
    assert [fate for fate in FATES if "line-through" in looks[fate]["line"]] == ["rolled_back"]
    assert len({look["background"] for look in looks.values()}) == len({look["color"] for look in looks.values()}) == 4
    texts = page.execute_script(
        "return [...document.querySelectorAll('.token')].map(e => [e.textContent, e.classList[0]])"
    )
    assert texts == [[token.text or token.name, token.fate] for token in in_page(traced)]
    assert texts[-1] == ["</s>", "own"]
    assert page.execute_script("return document.getElementById('output').textContent") == traced.text
    assert page.execute_script("return document.getElementById('prompt').textContent") == PROMPT


def test_measures_and_settings_stand_above_the_tokens(show, traced):
    page = show(traced)
    above = page.find_element(By.CSS_SELECTOR, ".measures").text.lower()
    measures = traced.measures
    for expected in (
        f"aal\n{measures['aal']:.2f}",
        f"acceptance rate\n{measures['acceptance_rate']:.1%}",
        f"rolled back\n{measures['num_rolled_back']}",
        f"draft density\n{measures['draft_density']:.3f}",
        f"effective density\n{measures['effective_density']:.3f}",
        f"output\n{sum(token.is_output for token in traced.tokens)}",
        f"gain by branches\n{measures['aal_gain']:+.1%}",
    ):
        assert expected in above
    settings = page.find_element(By.CSS_SELECTOR, ".settings").text
    for expected in ("method griffin", "density 0.3", "kernel_size 16", "threshold 0.1", "tree_width 4"):
        assert expected in settings
    assert "branch_cutoff" not in settings  # nobody chose it
    tops = [page.find_element(By.CSS_SELECTOR, name).rect["y"] for name in (".measures", ".settings", ".token")]
    assert tops == sorted(tops)


def test_cycles_are_set_apart(show, traced):
    page = show(traced)
    cycles = page.find_elements(By.CSS_SELECTOR, ".cycle")
    assert len(cycles) == traced.measures["num_cycles"] + 1
    for above, below in itertools.pairwise(cycles):
        assert above.rect["y"] + above.rect["height"] <= below.rect["y"] + 1
        assert below.value_of_css_property("border-top-width") == "1px"
    first = [token for token in traced.tokens if token.cycle == 1]
    num_kept = sum(token.fate == "kept" for token in first)
    num_drafted = num_kept + sum(token.fate == "rolled_back" for token in first)
    assert "prefill" in cycles[0].text and f"cycle 1\n{num_kept} of {num_drafted} kept" in cycles[1].text
    branches = cycles[1].find_elements(By.CSS_SELECTOR, ".lost")
    assert len(branches) == len({token.branch for token in first if token.fate == "branch"}) > 0


def test_the_likelihood_is_told_at_the_pointer(show, traced):
    page = show(traced)
    assert tip(page) == ""
    for fate in FATES:
        token = next(token for token in traced.tokens if token.fate == fate and token.text.strip())
        element = page.find_elements(By.CSS_SELECTOR, ".token")[in_page(traced).index(token)]
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(page).move_to_element(element).perform()
        assert tip(page) == expected_tip(token)
    ActionChains(page).move_to_element(page.find_element(By.CSS_SELECTOR, ".head")).perform()
    assert tip(page) == ""


def expected_tip(token: TracedToken) -> str:
    likelihood = "the full model was not asked"
    if token.likelihood is not None:
        share = "below 0.01%" if 0 < token.likelihood < 1e-4 else f"{token.likelihood:.2%}"
        likelihood = f"likelihood {share}"
    return f"{likelihood}\n{FATES[token.fate]}, token {token.position + 1}, id {token.token_id}"


def test_the_likelihood_is_told_by_the_keyboard(show, traced):
    page = show(traced)
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    active = page.switch_to.active_element
    assert active.text.strip() == traced.tokens[0].text.strip() and tip(page) == expected_tip(traced.tokens[0])
    assert active.value_of_css_property("outline-style") == "solid"
    for i, key in enumerate((Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_RIGHT), 1):
        page.switch_to.active_element.send_keys(key)
        assert tip(page) == expected_tip(traced.tokens[i])
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert tip(page) == expected_tip(traced.tokens[2])
    described = page.switch_to.active_element.get_attribute("aria-describedby")
    assert page.find_element(By.ID, described).get_attribute("role") == "tooltip"
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert tip(page) == ""
    page.switch_to.active_element.send_keys(Keys.TAB)  # past all other tokens
    assert not page.execute_script("return document.activeElement.matches('.token')")


def test_the_likelihood_is_told_by_a_touch(show, traced):
    page = show(traced, width=375)
    page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        element = page.find_elements(By.CSS_SELECTOR, ".token")[5]
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        x, y = page.execute_script(
            "const box = arguments[0].getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]",
            element,
        )
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert tip(page) == expected_tip(traced.tokens[5])
    finally:
        page.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_screen(show, traced, width):
    long = TracedToken(3, "x" * 300, "", "kept", 0.5, 1, 0)
    branch = dataclasses.replace(long, fate="branch", branch=1, after="y" * 90)
    for shown in (traced, make_trace([long, branch], prompt="z" * 500, model_name="n" * 200)):
        page = show(shown, width)
        scrolled, visible = page.execute_script(
            "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]"
        )
        assert scrolled == visible
        for element in page.find_elements(By.CSS_SELECTOR, ".token")[::9]:
            page.execute_script("arguments[0].focus()", element)
            box = page.find_element(By.ID, "tip").rect
            assert tip(page) and box["x"] >= 0 and box["x"] + box["width"] <= visible


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_can_be_read_in_light_and_dark(show, traced, scheme):
    page = show(traced, scheme=scheme)
    selectors = ["body", "h1", "h1 small", "dt", "dd", "dd strong", ".settings b", ".text", ".hint", ".head", ".after"]
    selectors += [f".token.{fate}" for fate in FATES]
    for selector in selectors:
        ratio = page.execute_script(
            """let element = document.querySelector(arguments[0]);
               const numbers = color => color.match(/[0-9.]+/g).map(Number);
               const luminance = color => numbers(color).slice(0, 3).map(value => value / 255)
                 .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
                 .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
               const text = luminance(getComputedStyle(element).color);
               while (numbers(getComputedStyle(element).backgroundColor)[3] === 0) element = element.parentElement;
               const behind = luminance(getComputedStyle(element).backgroundColor);
               return (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05)""",
            selector,
        )
        assert ratio >= 4.5, selector  # WCAG AA
    red = int(styles(page, "body")[0]["background"].split("(")[1].split(",")[0])
    assert (red < 64) if scheme == "dark" else (red > 192)


def test_the_page_needs_no_network(show, traced):
    page = show(traced)
    page.get_log("performance"), page.get_log("browser")
    page.refresh()
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [page.current_url]
    assert page.get_log("browser") == []  # neither errors nor what the policy keeps out


def test_text_is_text(show):
    tokens = [
        TracedToken(3, HOSTILE, "", "own", 0.5, 0, 0),
        TracedToken(4, "\n", "", "kept", 0.5, 1, 1),
        TracedToken(5, "", HOSTILE, "rolled_back", None, 1, 2),
        TracedToken(6, HOSTILE, "", "branch", None, 1, 2, branch=1, after="<b>&amp;"),
        TracedToken(7, "", "", "own", 0.5, 1, 2),
    ]
    config = {**SiriusConfig(tree_width=2).to_dict(), "method": HOSTILE}
    page = show(make_trace(tokens, prompt=HOSTILE, model_name=HOSTILE, config=config))
    assert page.title == f"{HOSTILE} with its sparse twin"
    assert page.find_elements(By.TAG_NAME, "img") == [] and len(page.find_elements(By.TAG_NAME, "script")) == 1
    assert page.execute_script("return document.getElementById('prompt').textContent") == HOSTILE
    shown = page.execute_script("return [...document.querySelectorAll('.token')].map(e => e.textContent)")
    assert shown == [HOSTILE, "\n", HOSTILE, "·", HOSTILE]
    assert HOSTILE in page.find_element(By.CSS_SELECTOR, ".settings").text
    assert page.find_element(By.CSS_SELECTOR, ".after").text == "<b>&amp;"
    newline = page.find_elements(By.CSS_SELECTOR, ".token")[1]
    assert newline.rect["width"] > 0  # so that it can be pointed at
    # A script that got in all the same would not be run.
    page.execute_script(
        "const script = document.createElement('script'); script.textContent = \"document.title = 'owned'\";"
        "document.body.append(script)"
    )
    assert page.title != "owned"


def test_a_call_without_tokens_or_trees(show):
    page = show(make_trace())
    assert page.find_elements(By.CSS_SELECTOR, ".token") == []
    assert "–" in page.find_element(By.CSS_SELECTOR, ".measures").text
    assert "gain" not in page.find_element(By.CSS_SELECTOR, ".measures").text
    assert styles(page, ".legend .branch") == []


def test_a_report_is_the_same_each_time(traced):
    assert report(traced) == report(traced)


# The command


def test_report_writes_the_page_and_the_data(page, tmp_path, capsys):
    files = ["--output", str(tmp_path / "page.html"), "--json", str(tmp_path / "page.json")]
    command = ["report", "--model", "reasoner", "--prompt", PROMPT, "--method", "griffin", "--density", "0.3", *files]
    assert main([*command, "--threshold", "1.0", "--max_new_tokens", "30"]) == 0
    assert "page.html" in capsys.readouterr().out
    data = json.loads((tmp_path / "page.json").read_text())
    assert data["config"]["density"] == 0.3 and data["measures"]["num_cycles"] > 0
    assert data["prompt"] == f"<s>{PROMPT}"
    page.get((tmp_path / "page.html").as_uri())
    assert page.execute_script("return document.getElementById('output').textContent") == data["text"]
    main(["generate", *command[1:9], "--threshold", "1.0", "--max_new_tokens", "30"])
    assert capsys.readouterr().out.strip() == data["text"].strip()


@pytest.mark.parametrize("option", ["--output", "--json"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_loaded(option, tmp_path, capsys):
    command = ["report", "--model", str(tmp_path / "no model"), "--prompt", "x"]
    assert main([*command, option, str(tmp_path / "nowhere" / "file")]) == 2
    error = capsys.readouterr().err
    assert f"the directory of {option}" in error and "does not exist: make it first" in error
    assert main([*command, option, str(tmp_path)]) == 2
    assert "is a directory: name a file in it" in capsys.readouterr().err
