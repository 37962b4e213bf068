"""Draws `docs/run.svg`, the README's picture: frames of one real run of the bundled model.

python docs/picture.py
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pdiff_runtime import LLM
from pdiff_runtime.engine import Finished, PlanReady, SpanUpdate
from pdiff_runtime.serve.generate import summary
from pdiff_runtime.serve.live import LiveRound

PROMPT = "Tell me about Peru: capital, currency, climate and exports."
SHOWN_STEPS = (1, 3)


def main() -> None:
    """Run the prompt and draw the plan, some steps and the answer."""
    llm = LLM()
    console = Console(record=True, width=92, height=60, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "dim"), f'pdiff generate "{PROMPT}"\n'))
    view = None
    for event in llm.stream(PROMPT):
        if isinstance(event, PlanReady):
            view = LiveRound(event, llm.tokenizer.decode, llm.tags.pad, console)
            lengths = (hi - lo for lo, hi in event.bounds)
            plan = ", ".join(map("{} {}".format, event.topics, lengths))
            console.print(Text.assemble(("plan  ", "bold"), plan, "\n"))
        elif isinstance(event, SpanUpdate):
            view.update(event)
            if view.step in SHOWN_STEPS:
                console.print(view)
        elif isinstance(event, Finished):
            view.finish()
            console.print(view)
            output = event.output
    console.print(Text.assemble("\n", output.text, "\n"))
    console.print(Text(summary(output, llm.tags, output.usage.seconds), style="dim"))
    svg = console.export_svg(title="pdiff generate")
    # No fonts from the network: the reader's own monospace does.
    svg = re.sub(r"@font-face\s*{[^}]*}", "", svg).replace("Fira Code, ", "")
    Path(__file__).with_name("run.svg").write_text(svg, "utf-8")


if __name__ == "__main__":
    main()
