"""Run: python tests/browser.py [SCREENSHOT.png]     (by hand: needs chromium and chromedriver)

Opens a page of 10,000 rollouts in a headless Chromium, over the WebDriver protocol, and clicks:
sort, filter, search, scroll. Texts that are HTML must stay texts, pictures must load when seen.
"""

import base64
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import Request, urlopen

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import page  # noqa: E402

PORT = 9517
HOSTILE = "</script><script>document.title='ran'</script><img src=x onerror=document.title='ran'>"
FLAGS = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,900"]


class Browser:
    def __init__(self):
        self.session = ""
        chrome = {"browserName": "chrome", "goog:chromeOptions": {"args": FLAGS}}
        found = self.call("POST", "", {"capabilities": {"alwaysMatch": chrome}})
        self.session = "/" + found["sessionId"]

    def call(self, method, path, body=None):
        url = f"http://127.0.0.1:{PORT}/session{self.session}{path}"
        data = None if body is None else json.dumps(body).encode()
        request = Request(url, data, {"Content-Type": "application/json"}, method=method)
        with urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def run(self, script):
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def element(self, xpath):
        found = self.call("POST", "/element", {"using": "xpath", "value": xpath})
        return "/element/" + next(iter(found.values()))

    def choose(self, name, option):
        found = self.element(f"//select[@id='{name}']/option[.='{option}']")
        self.call("POST", found + "/click", {})

    def type(self, name, text):
        box = self.element(f"//input[@id='{name}']")
        self.call("POST", box + "/clear", {})
        self.call("POST", box + "/value", {"text": text})

    def numbers(self, key):
        """The values of `key` in the rollouts shown."""
        script = "return [...document.querySelectorAll('.numbers')].map(e => e.textContent)"
        lines = [dict(part.rsplit(" ", 1) for part in line.split(" · ")[1:])
                 for line in self.run(script)]  # fmt: skip
        return [float(line[key]) if key in line else None for line in lines]


def write(folder):
    """10,000 rollouts of 157 steps, every tenth without a score, one of them hostile."""
    rng, lines = random.Random(0), []
    pictures = [Image.effect_noise((320, 240), 80).convert("RGB") for _ in range(40)]
    names = [page.save_picture(picture, folder) for picture in pictures]
    for n in range(10_000):
        scores = {"d_v": rng.gauss(0, 1)} if n % 10 else {}
        text = f"<caption>\n{n} bars\n</caption>\n<think>\n{'word ' * 300}\n</think>\n<answer>\n{n}"
        lines.append({"step": 1 + n // 64, "id": f"row {n}", "question": "<image>How many bars?"})
        lines[-1] |= {"gold": str(n), "images": [names[n % 40]], "response": f"{text}\n</answer>"}
        lines[-1] |= {"finished": True, **scores, "reward": rng.random(), "advantage": 0.0}
    lines[5000] |= dict.fromkeys(("id", "question", "response", "gold"), HOSTILE)
    page.write_page(f"{folder}/rollouts.html", "rollouts", lines)


def click(browser, screenshot):
    assert browser.run("return document.images.length") == 50
    loaded = "return [...document.images].filter(i => i.complete && i.naturalWidth).length"
    time.sleep(1)
    assert 0 < browser.run(loaded) < 50  # those in sight
    for order, sign in (("falling", -1), ("rising", 1)):
        browser.choose("key", "d_v")
        browser.choose("sign", order)
        values = browser.numbers("d_v")
        assert None not in values and values == sorted(values, key=lambda value: sign * value)
    browser.choose("only", "step")
    browser.type("low", "30")
    browser.type("high", "30")
    assert set(browser.numbers("step")) == {30} and len(browser.numbers("step")) == 50
    browser.run("window.scrollTo(0, document.body.scrollHeight)")
    time.sleep(1)
    values = browser.numbers("d_v")
    assert len(values) == 64 and None in values and None not in values[: values.index(None)]
    Path(screenshot).write_bytes(base64.b64decode(browser.call("GET", "/screenshot")))
    browser.choose("only", "all")
    browser.type("text", "onerror")
    assert browser.run("return document.querySelector('.question').textContent") == HOSTILE
    assert browser.run("return [document.title, document.scripts.length]") == ["rollouts", 2]


def main():
    screenshot = sys.argv[1] if len(sys.argv) > 1 else "rollouts.png"
    driver = subprocess.Popen(["chromedriver", f"--port={PORT}"], stdout=subprocess.DEVNULL)
    try:
        time.sleep(3)
        browser = Browser()
        with tempfile.TemporaryDirectory() as folder:
            write(folder)
            began = time.time()
            browser.call("POST", "/url", {"url": f"file://{folder}/rollouts.html"})
            print(f"10,000 rollouts opened in {time.time() - began:.1f} s")
            click(browser, screenshot)
        browser.call("DELETE", "")
        print(f"sorted, filtered and searched; {screenshot} written")
    finally:
        driver.terminate()


if __name__ == "__main__":
    main()
