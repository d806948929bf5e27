"""Makes links of the names that docstrings set in brackets, [`Cycle`], where a page has them."""

import re


def on_page_content(html: str, **kwargs) -> str:
    anchors = {name.rpartition(".")[2]: name for name in re.findall(r'id="(hf_sirius\.[\w.]+)"', html)}

    def link(found: re.Match) -> str:
        name = found[1]
        return f'<a href="#{anchors[name]}"><code>{name}</code></a>' if name in anchors else f"<code>{name}</code>"

    return re.sub(r"\[<code>(\w+)</code>\]", link, html)
