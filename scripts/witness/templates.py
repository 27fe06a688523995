#!/usr/bin/env python3
"""Golden texts of chat templates, as transformers renders them.

    templates.py        writes tests/golden/templates/rendered.json

With `pip install transformers==5.23.0 jinja2==3.1.6`. The templates beside it are of our own writing;
together they use what the supported families' templates use. Each is rendered for each conversation,
with and without a prompt for the next answer: the text, or null where transformers refuses. Templates
with generation blocks have transformers' own mask of the assistant's tokens too. expressions.txt holds
what else templates may do, a line each; ⏎ is a newline.
"""

import json
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "golden" / "templates"
TOKENIZER = FOLDER.parents[1] / "cases" / "loading" / "base" / "tokenizer.json"
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}


def rendered(template: str, chat: dict, prompt: bool) -> dict:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), **SPECIAL)
    given = {"tools": chat.get("tools"), "documents": chat.get("documents"), "chat_template": template,
             "add_generation_prompt": prompt, **chat.get("chat_template_kwargs", {})}
    try:
        found = {"text": tokenizer.apply_chat_template(chat["messages"], tokenize=False, **given)}
    except Exception:  # Whatever a template raises: that it does is what counts.
        return {"text": None}
    if "generation" in template.split():
        masked = tokenizer.apply_chat_template(
            chat["messages"], return_assistant_tokens_mask=True, return_dict=True, **given)
        found["mask"] = "".join(map(str, masked["assistant_masks"]))
    return found


def main() -> None:
    lines = (FOLDER / "conversations.jsonl").read_text().splitlines()
    chats = {chat["name"]: chat for chat in map(json.loads, lines)}
    cases = [
        {"template": file.stem, "conversation": name, "prompt": prompt,
         **rendered(file.read_text(), chat, prompt)}
        for file in sorted(FOLDER.glob("*.jinja")) for name, chat in chats.items()
        for prompt in (False, True)
    ]
    chat = json.loads((FOLDER / "variables.json").read_text())
    lines = (FOLDER / "expressions.txt").read_text().split("\n")
    sources = [line.replace("⏎", "\n") for line in lines if line.strip()]
    out = {
        "transformers": version("transformers"), "jinja2": version("jinja2"), "special": SPECIAL,
        "cases": cases,
        "expressions": [[source, rendered(source, chat, True)["text"]] for source in sources],
    }
    (FOLDER / "rendered.json").write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")
    print(len(cases), "texts,", sum(case["text"] is None for case in cases), "refused;",
          len(sources), "expressions")


if __name__ == "__main__":
    main()
