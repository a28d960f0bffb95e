"""Markdown of the built-in page, in a Chromium."""

from __future__ import annotations

import json

import pytest
from page_person import Person, needs_browser

MARKDOWN = [
    (
        "plain *it* **bold** _it_ ~~no~~",
        "<p>plain <em>it</em> <strong>bold</strong> <em>it</em> <s>no</s></p>",
    ),
    ("2 * 3 * 4, snake_case_name, \\*not\\*", "<p>2 * 3 * 4, snake_case_name, *not*</p>"),
    (
        "**a *b* c** ***both***",
        "<p><strong>a <em>b</em> c</strong> <strong><em>both</em></strong></p>",
    ),
    ("`a < b` ``x ` y``", "<p><code>a &lt; b</code> <code>x ` y</code></p>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("# One\n### Three ###", "<h1>One</h1><h3>Three</h3>"),
    ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
    ("> one\n> > two", "<blockquote><p>one</p><blockquote><p>two</p></blockquote></blockquote>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("- a\n\n  more\n- b", "<ul><li><p>a</p><p>more</p></li><li>b</li></ul>"),
    (
        "| a | b |\n|---|--:|\n| `x\\|y` | 2 |\nafter",
        '<div class="grid"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead>'
        '<tbody><tr><td><code>x|y</code></td><td class="right">2</td></tr></tbody></table></div>'
        "<p>after</p>",
    ),
    (
        "```py\nif a < b:\n  **c**\n```\nafter",
        '<div class="code"><div><span>py</span><button type="button">Copy</button></div><pre>'
        "<code>if a &lt; b:\n  **c**</code></pre></div><p>after</p>",
    ),
    (
        "[here](https://a.b/c) <https://d.e> see https://f.g/h.",
        '<p><a href="https://a.b/c" target="_blank" rel="noopener noreferrer">here</a> <a'
        ' href="https://d.e/" target="_blank" rel="noopener noreferrer">https://d.e</a> see <a'
        ' href="https://f.g/h" target="_blank" rel="noopener noreferrer">https://f.g/h</a>.</p>',
    ),
    ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
    ("[x](data:text/html,y) [y](/z)", "<p>[x](data:text/html,y) [y](/z)</p>"),
    ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
]
DRAWN = """text => {
  const place = document.createElement("div");
  drawMarkdown(place, text);
  return place.innerHTML;
}"""


@needs_browser
def test_markdown(person: Person) -> None:
    for text, expected in MARKDOWN:
        assert person.page.run(f"({DRAWN})({json.dumps(text)})") == expected, text


@needs_browser
def test_markdown_drawn_while_it_comes(person: Person) -> None:
    """Ends as if drawn at once, and finished blocks stay the nodes they were."""
    text = "\n\n".join(text for text, _ in MARKDOWN)
    whole, same, kept = person.page.run(f"""(() => {{
      const text = {json.dumps(text)}, place = document.createElement("div");
      let first = null, kept = true;
      for (let end = 1; end <= text.length; end++) {{
        drawMarkdown(place, text.slice(0, end));
        if (end === 60) first = place.firstChild;
        if (end > 60) kept = kept && first === place.firstChild;
      }}
      return [({DRAWN})(text), place.innerHTML, kept];
    }})()""")
    assert whole == same and kept


@needs_browser
@pytest.mark.parametrize(
    "unit", ["*", "**a", "_", "`", "[", "[a](", "> ", "- ", "<", "|", "```\n", "\n\n- a\n", "~~"]
)
@pytest.mark.few(2)
def test_markdown_of_any_text_ends(person: Person, unit: str) -> None:
    length = person.page.run(f"({DRAWN})({json.dumps(unit)}.repeat(20000)).length")
    assert length > 0
