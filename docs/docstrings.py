"""How docstrings become pages: an extension of griffe, which reads them, and a hook of MkDocs, which writes them."""

import re

import griffe


class Fields(griffe.Extension):
    """Shows a field of `SiriusConfig` with its own default in place of the call that makes it, and once."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        fields, config = pkg["settings.fields.Fields"], pkg["settings.config.SiriusConfig"]
        for field in fields.attributes.values():
            if isinstance(field.value, griffe.ExprCall):
                field.value = field.value.arguments[0]
        text = re.sub(r"(?m)^( +\w+) \(.*\):\n +", r"\1: ", fields.docstring.value)
        config.docstring = griffe.Docstring(text, parent=config, parser=griffe.Parser.google)


def on_page_content(html: str, **kwargs) -> str:
    """Makes links of the names that docstrings set in brackets, such as [`Cycle`], where the page has them."""
    anchors = {name.rpartition(".")[2]: name for name in re.findall(r'id="(hf_sirius\.[\w.]+)"', html)}

    def link(found: re.Match) -> str:
        name = found[1] or found[2]
        return f'<a href="#{anchors[name]}"><code>{name}</code></a>' if name in anchors else f"<code>{name}</code>"

    return re.sub(r"\[<code>(\w+)</code>\]|<code>\[`(\w+)`\]</code>", link, html)
