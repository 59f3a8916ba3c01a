"""A browser for tests: headless Chromium over the DevTools protocol, no driver needed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-default-apps",
)
UNTIL = """
window.until = (what, limit_ms = 20000) => new Promise((resolve, reject) => {
  const check = () => {
    const value = what();
    if (!value) return;
    observer.disconnect();
    clearTimeout(timer);
    resolve(value);
  };
  const observer = new MutationObserver(check);
  const timer = setTimeout(() => {
    const status = JSON.stringify(window.parley?.status());
    reject(new Error(`not within ${limit_ms} ms: ${what} ${status} ${document.body.innerText}`));
  }, limit_ms);
  const all = { subtree: true, childList: true, attributes: true, characterData: true };
  observer.observe(document, all);
  check();
});
"""
"""Resolves when the page has changed so that `what()` holds."""


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def launched(binary: str, profile: Path, flags: Sequence[str] = ()) -> Iterator[Chromium]:
    """One browser process with a fresh profile."""
    sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
    command = [binary, *FLAGS, *sandbox, f"--user-data-dir={profile}", *flags, "about:blank"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            with connect(_address(process), max_size=None, proxy=None) as socket:
                browser = Chromium(socket)
                yield browser
                browser.call("Browser.close")
        except BaseException:
            process.kill()
            raise


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        found = re.search(r"DevTools listening on (ws://\S+)", line)
        if found:
            return found[1]
    raise RuntimeError("Chromium did not start: " + "".join(said))


class Chromium:
    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One DevTools command. Raises `RuntimeError` with the browser's answer."""
        message = {"id": next(self._ids), "method": method, "params": params}
        self._socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            answer: dict[str, Any] = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") != message["id"]:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def page(self, url: str) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, target, session)
        page.call("Page.enable")
        page.call("Runtime.enable")
        page.call("Log.enable")
        page.call("Network.setCacheDisabled", cacheDisabled=True)
        page.call("Page.addScriptToEvaluateOnNewDocument", source=UNTIL)
        page.open(url)
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, target: str, session: str) -> None:
        self._browser = browser
        self._target = target
        self._session = session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.evaluate("until(() => window.parley)")

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, awaited and clicked for. Raises `RuntimeError`."""
        result = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in result:
            thrown = result["exceptionDetails"]
            raise RuntimeError(thrown.get("exception", {}).get("description") or thrown["text"])
        return result["result"].get("value")

    def key(self, kind: str, key: str, code: str) -> None:
        """`kind` is keyDown or keyUp."""
        self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code)

    def errors(self) -> list[str]:
        """Uncaught exceptions, and what the browser logged as errors (blocked by CSP, 404 ...)."""
        said = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                said.append(str(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                entry = event["params"]["entry"]
                if entry["level"] == "error":
                    said.append(f"{entry['text']} {entry.get('url', '')}")
        return said

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
