"""Chat templates against transformers: the same messages through both, differences printed.

    python templates.py PROGRAM TEMPLATE.jinja ...

PROGRAM is the example `text_results` of forge-text. Templates are any files at hand, such as those of a llama.cpp
source package (models/templates). Needs transformers and jinja2. A template whose content is brought into another
form before rendering (lists of parts) is compared on the messages that are not.
"""

import json
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "fixtures" / "text"))
from make_templates import CASES, NOW, SPECIAL_TOKENS, FixedClock, chat_template_utils, render  # noqa: E402

ALL_CASES = CASES


def ours(program, source):
    request = {"template": source, "special_tokens": SPECIAL_TOKENS, "now": NOW, "cases": ALL_CASES}
    done = subprocess.run([program], input=json.dumps(request), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def is_converted(case, content_format):
    contents = [message.get("content") for message in case["messages"]]
    if content_format == "String":
        return any(isinstance(content, list) for content in contents)
    return content_format == "Parts" and any(isinstance(content, str) for content in contents)


def main():
    program, *paths = sys.argv[1:]
    chat_template_utils.datetime = FixedClock
    compared = differing = 0
    for path in map(pathlib.Path, paths):
        source = path.read_text()
        theirs = [render(source, case) for case in ALL_CASES]
        result = ours(program, source)
        if "error" in result:
            print(f"{path.name}: does not compile: {result['error']}")
            differing += 1
            continue
        shown = 0
        for case, expected, found in zip(ALL_CASES, theirs, result["results"]):
            if is_converted(case, result["content_format"]):
                continue
            compared += 1
            failed = "error" in expected and "error" in found
            raised = expected.get("error") == "TemplateError"
            if found == expected or (failed and not raised):
                continue
            differing += 1
            shown += 1
            if shown <= 2:
                print(f"{path.name}: {json.dumps(case)[:300]}\n  transformers: {expected}\n  Forge:        {found}")
        print(f"{path.name}: {result['content_format']}, {shown} differ")
    print(f"{compared} renderings of {len(paths)} templates compared, {differing} differ")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
