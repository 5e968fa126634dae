"""What every page promises, as far as a parser sees it: well-formed, self-contained, in one file."""

import re
from html.parser import HTMLParser

_VOID = {"meta", "link", "img", "input", "br"}
# SVG's own shapes, written as <line …/>.
_ADDRESSES = {"src", "href", "action", "poster", "data", "srcset", "xlink:href"}


class Page(HTMLParser):
    """Raises AssertionError for tags that don't match; keeps tags, ids of addresses and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in _ADDRESSES]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.text += data


def parse_page(text: str) -> Page:
    """The page, which is one whole document and names nothing outside of itself."""
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert all(address.startswith(("data:", "#")) for address in page.addresses), page.addresses
    assert not re.search(r"https?://|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket", text)
    assert "default-src 'none'" in text
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text
    return page
