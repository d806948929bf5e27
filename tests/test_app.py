"""The app, as a browser shows it."""

import importlib.util
import json
import os
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import chromium, set_screen
from gradio_client import Client
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sirius import reasoner_path, reasoner_problems


PROBLEMS = [problem["question"] for problem in reasoner_problems()[:2]]
SHORT = ("griffin", 0.3, 16, 1.0, 1, 24)  # method, density, kernel size, threshold, tree width, new tokens
SECONDS = 60
# Notes how many tokens the page shows, each time that it shows others.
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const length = document.querySelectorAll(".tokens > *").length;
  if (length !== window.seen.at(-1)) window.seen.push(length);
}).observe(document.body, {childList: true, subtree: true, characterData: true});
"""


@pytest.fixture(scope="module")
def reasoner():
    path = reasoner_path()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def url(reasoner):
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"
    file = Path(__file__).parents[1] / "examples" / "app.py"
    spec = importlib.util.spec_from_file_location("app", file)
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    blocks = app.build(*reasoner)
    _, url, _ = app.launch(blocks, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield url
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def page(browser, url):
    set_screen(browser, 1280, 900)
    browser.get(url)
    wait(lambda: find(browser, "#generate"))
    browser.execute_script(WATCH)
    return browser


def find(page, selector: str):
    return page.find_elements(By.CSS_SELECTOR, selector)


def wait(condition):
    return WebDriverWait(None, SECONDS, poll_frequency=0.05).until(lambda _: condition())


def fill(page, name: str, value) -> None:
    field = find(page, f"#{name} textarea, #{name} input[type=number]")[0]
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(str(value), Keys.TAB)


def click(page, name: str) -> None:
    find(page, f"#{name}")[0].click()


def runs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sirius-run"]


def is_left_alone(model) -> bool:
    return not runs() and "generate" not in model.__dict__


def answer_of(reasoner, problem: str) -> str:
    model, tokenizer = reasoner
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=200, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def shown_answer(page) -> str:
    tokens = "[...document.querySelectorAll('.tokens > .kept, .tokens > .own')]"
    return page.execute_script(f"return {tokens}.map(token => token.textContent).join('')")


@pytest.fixture
def slow(reasoner):
    """A model that takes its time, so that a run can be caught at work."""
    handle = reasoner[0].register_forward_pre_hook(lambda *_: time.sleep(0.1))
    yield
    handle.remove()


def test_tokens_stream_in_and_the_answer_is_that_of_generate(page, reasoner):
    fill(page, "prompt", PROBLEMS[1])
    fill(page, "threshold", 1)
    fill(page, "tree_width", 3)
    click(page, "generate")
    wait(lambda: "</s>" in shown_answer(page))
    expected = answer_of(reasoner, PROBLEMS[1])
    assert shown_answer(page).replace(" ", "") == expected.replace(" ", "")
    seen = [number for number in page.execute_script("return window.seen") if number]
    assert len(seen) > 2 and seen == sorted(seen)

    styles = {
        fate: page.execute_script(
            f"const s = getComputedStyle(document.querySelector('.tokens > .{fate}'));"
            "return [s.color, s.backgroundColor, s.textDecorationLine]"
        )
        for fate in ("kept", "own", "rolled_back", "branch")
    }
    assert len({style[1] for style in styles.values()}) == len({style[0] for style in styles.values()}) == 4
    assert styles["rolled_back"][2] == "line-through" and styles["kept"][2] == "none"
    wait(lambda: is_left_alone(reasoner[0]))
    values = dict(
        zip(*([e.text for e in find(page, f".measures {tag}")] for tag in ("dt", "dd")), strict=True)
    )  # fmt: skip
    assert int(values["rolled back"]) == len(find(page, ".tokens > .rolled_back"))
    assert int(values["tokens"]) == len(find(page, ".tokens > .kept, .tokens > .own"))
    assert float(values["draft density"]) < 1


def test_a_stop_ends_the_run_and_another_one_can_start(page, reasoner, slow):
    click(page, "generate")
    wait(lambda: find(page, ".tokens > .kept") and runs())
    click(page, "stop")
    wait(lambda: is_left_alone(reasoner[0]))
    assert "</s>" not in shown_answer(page)
    fill(page, "length", 3)
    click(page, "generate")
    wait(lambda: len(find(page, ".tokens > .kept, .tokens > .own")) == 3 and is_left_alone(reasoner[0]))


def test_a_closed_page_ends_the_run(page, reasoner, slow):
    click(page, "generate")
    wait(runs)
    page.get("about:blank")
    start = time.monotonic()
    wait(lambda: is_left_alone(reasoner[0]))
    assert time.monotonic() - start < 4  # the whole answer would take four times as long


def test_errors_reach_the_reader(page, reasoner):
    fill(page, "prompt", " ")
    click(page, "generate")
    wait(lambda: "there is no prompt" in "".join(toast.text for toast in find(page, ".toast-wrap")))

    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    handle = reasoner[0].register_forward_pre_hook(fail)
    fill(page, "prompt", PROBLEMS[0])
    click(page, "generate")
    wait(lambda: "RuntimeError: out of luck" in "".join(toast.text for toast in find(page, ".toast-wrap")))
    wait(lambda: is_left_alone(reasoner[0]))
    handle.remove()


@pytest.mark.slow
def test_two_readers_at_once(url, reasoner, slow):
    clients = [Client(url, verbose=False) for _ in range(2)]
    alone = [clients[0].predict(problem, *SHORT, api_name="/run")[0] for problem in PROBLEMS]
    jobs = [client.submit(problem, *SHORT, api_name="/run") for client, problem in zip(clients, PROBLEMS, strict=True)]
    wait(lambda: len(runs()) == 2)
    assert [job.result(timeout=SECONDS)[0] for job in jobs] == alone
    assert alone[0] != alone[1]
    wait(lambda: is_left_alone(reasoner[0]))


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_can_be_read(width, scheme, page):
    set_screen(page, width, scheme=scheme)
    page.refresh()
    wait(lambda: find(page, ".legend .own"))
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    colors = page.execute_script(
        "const s = getComputedStyle(document.querySelector('.legend .own')); return [s.color, s.backgroundColor]"
    )
    text, back = (sum(int(part) for part in color[4:-1].split(",")) for color in colors)
    assert (text < back) == (scheme == "light") and abs(text - back) > 300


def test_it_asks_nothing_of_the_network(page):
    hosts = set()
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = urlsplit(message["params"]["request"]["url"])
            hosts |= {address.hostname} if address.scheme in ("http", "https", "ws", "wss") else set()
    assert hosts == {"127.0.0.1"}
