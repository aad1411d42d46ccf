#!/usr/bin/env bash
# The curl lines of the README and of docs/, as a reader would paste them, against FORGE_TEST_URL.
set -euo pipefail
url="${FORGE_TEST_URL:?start the suite with tests/conformance/run.sh}"
root="$(cd "$(dirname "$0")/../.." && pwd)"

expect() { # expect NAME PATTERN COMMAND...
    local name="$1" pattern="$2" answer
    shift 2
    answer="$("$@")"
    if ! grep -q -- "$pattern" <<<"$answer"; then
        printf 'curl %s: %s is not in\n%s\n' "$name" "$pattern" "$answer" >&2
        exit 1
    fi
    printf 'curl %s: ok\n' "$name"
}

json=(-H 'content-type: application/json')
expect chat '"role":"assistant"' curl -sS "$url/v1/chat/completions" "${json[@]}" \
    -d '{"model":"forge","messages":[{"role":"user","content":"Hi"}],"max_tokens":8}'
expect stream '^data: \[DONE\]' curl -sSN "$url/v1/chat/completions" "${json[@]}" \
    -d '{"model":"forge","messages":[{"role":"user","content":"Hi"}],"max_tokens":8,"stream":true}'
expect completion '"object":"text_completion"' curl -sS "$url/v1/completions" "${json[@]}" \
    -d '{"model":"forge","prompt":"Once","max_tokens":4}'
expect models '"object":"list"' curl -sS "$url/v1/models"
expect tokenize '"tokens":\[' curl -sS "$url/tokenize" "${json[@]}" -d '{"model":"forge","prompt":"Hello"}'
expect key-is-ignored '"object":"list"' curl -sS "$url/v1/models" -H 'authorization: Bearer anything'
expect request-id 'x-request-id: my-id-1' curl -sSi "$url/v1/models" -H 'x-request-id: my-id-1'
expect health '200' curl -sS -o /dev/null -w '%{http_code}' "$url/health"

# Every `curl` block of the README, with the address of this server.
count=0
while IFS= read -r -d '' block; do
    expect "of the README" '"choices"' bash -c "${block//http:\/\/127.0.0.1:8000/$url} -sS"
    count=$((count + 1))
done < <(python3 - "$root/README.md" <<'PY'
import re, sys
text = open(sys.argv[1]).read()
for block in re.findall(r"```sh\n(.*?)```", text, re.S):
    if block.lstrip().startswith("curl"):
        sys.stdout.write(block.strip() + "\0")
PY
)
[ "$count" -gt 0 ] || { echo "the README has no curl line" >&2; exit 1; }
echo "curl: all lines answered"
